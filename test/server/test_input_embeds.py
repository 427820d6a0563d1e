"""Requests with embeddings in place of tokens: answered as those with the tokens, and beside them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from families import Family, make_model
from harness import SMALL_CHUNKS
from safetensors.torch import load_file
from sglang_shift.models.demo import demo_model_path

pytestmark = [pytest.mark.server, pytest.mark.full]

FLAGS = (*SMALL_CHUNKS, "--disable-radix-cache")
PROMPTS = [[n + 7 * i for i in range(n)] for n in (5, 40, 90, 150)]  # in TP, in SP, in SP, in two chunks


# SGLang's class of Granite has no method that returns its embeddings.
@pytest.mark.parametrize("family", [None, Family("GraniteConfig", [])], ids=["demo", "granite"])
def test_embeddings_beside_tokens(servers, tmp_path, family):
    """In one step they ended the server: SGLang puts only the embeddings together, and the rows of tokens miss."""
    folder = str(tmp_path) if family else demo_model_path()
    if family:
        make_model(folder, family)
    server = servers.get(*FLAGS, "--model-path", folder)
    (file,) = Path(folder).glob("*.safetensors")
    rows = load_file(file)["model.embed_tokens.weight"].float()
    expected = [server.generate(ids, 6) for ids in PROMPTS]
    steps = server.state["steps"]
    for _ in range(3):
        with ThreadPoolExecutor(16) as pool:
            asked = []
            for ids in PROMPTS:
                body = {"sampling_params": {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}}
                for given in ({"input_ids": ids}, {"input_embeds": rows[ids].tolist()}):
                    asked.append(pool.submit(server.post, "/generate", {**body, **given}))
        answers = [future.result()["output_ids"] for future in asked]
        assert answers == [answer.tokens for answer in expected for _ in range(2)]
    after = server.state["steps"]
    assert all(after[mode] > steps[mode] for mode in ("tp", "sp"))
