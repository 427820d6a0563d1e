"""Each family against Hugging Face transformers: tiny random models, float32, real servers."""

from __future__ import annotations

import pytest
from families import FAMILIES, greedy, make_model
from prompts import assert_same_answers

pytestmark = [pytest.mark.server, pytest.mark.full]

NEW_TOKENS = 16
LENGTHS = [1, 2, 3, 5, 17, 64, 101, 200]


@pytest.mark.parametrize("name", FAMILIES)
def test_same_tokens_as_transformers(name, servers, tmp_path):
    family = FAMILIES[name]
    model = make_model(str(tmp_path), family)
    prompts = [[(37 * i + 11 * n) % 4000 + 10 for i in range(n)] for n in LENGTHS]
    server = servers.get("--dtype", "float32", "--model-path", str(tmp_path), *family.flags)
    answers = server.generate_all(prompts, 1, NEW_TOKENS) + server.generate_all(prompts, 8, NEW_TOKENS)
    steps = server.state["steps"]
    assert_same_answers(answers, [greedy(model, ids, NEW_TOKENS) for ids in prompts] * 2)
    assert steps["sp"] > 0
    assert (steps["tp"] > 0) == (family.mode == "both"), f"{steps}: --sp-size alone must run every step in SP"
