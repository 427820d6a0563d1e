"""Models that pool: embeddings, classes and rewards, in both modes, against Hugging Face transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from families import Family, make_model
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.server, pytest.mark.full]

LENGTHS = [1, 2, 3, 5, 17, 64, 101, 200]
PROMPTS = [[(37 * i + 11 * n) % 4000 + 10 for i in range(n)] for n in LENGTHS]
TWO, FOUR = ("--tp-size", "2"), ("--tp-size", "4", "--sp-size", "2")
QWEN2 = Family("Qwen2Config", [])


class Pooling(NamedTuple):
    """A kind of model that pools.

    Attributes:
        architecture: Its name in ``config.json``.
        flags: Flags of its server.
        heads: The sizes of the linears after the layers, by name.
        values: Computes what the server answers, from the hidden states of the last token and the heads.
    """

    architecture: str
    flags: tuple[str, ...]
    heads: dict[str, tuple[int, int]]
    values: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


def linear(x: torch.Tensor, heads: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return x @ heads[f"{name}.weight"].T + heads[f"{name}.bias"]


KINDS = {
    # SGLang's pooler takes the last row, and normalizes it.
    "embeddings": Pooling(
        "Qwen2ForCausalLM", (*TWO, "--is-embedding"), {}, lambda x, heads: torch.nn.functional.normalize(x, dim=-1)
    ),
    # SGLang pools without calling its pooler.
    "classes": Pooling(
        "Qwen2ForSequenceClassification", FOUR, {"score": (64, 3)}, lambda x, heads: linear(x, heads, "score")
    ),
    # The heads come before the pooler.
    "rewards": Pooling(
        "Qwen2ForRewardModel", TWO, {"score.0": (64, 64), "score.2": (64, 1)},
        lambda x, heads: linear(linear(x, heads, "score.0").relu(), heads, "score.2"),
    ),
}  # fmt: skip


def make(folder: Path, kind: Pooling) -> list[torch.Tensor]:
    """Save a tiny model of a kind. Return what it computes for each prompt."""
    model = make_model(str(folder), QWEN2)
    generator = torch.Generator().manual_seed(1)
    heads = {}
    for name, (inputs, outputs) in kind.heads.items():
        heads[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        heads[f"{name}.bias"] = torch.randn(outputs, generator=generator)
    save_file(load_file(folder / "model.safetensors") | heads, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": [kind.architecture], "id2label": {str(i): str(i) for i in range(3)}}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        last = [model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in PROMPTS]
        return [kind.values(row, heads) for row in last]


@pytest.mark.parametrize("name", KINDS)
def test_same_values_as_transformers(name, servers, tmp_path):
    kind = KINDS[name]
    expected = make(tmp_path, kind)
    flags = ("--dtype", "float32", "--model-path", str(tmp_path), "--chunked-prefill-size", "64")
    server = servers.get(*flags, *kind.flags, "--enable-shift-parallel", "--shift-threshold", "8")
    assert "the modes compute the same (SP is within" in server.log.read_text(errors="replace")
    for policy in ("tp", "sp", "tokens"):
        server.flush_cache()
        with server.policy(policy, 8) as steps:
            values = [ask(server, ids) for ids in PROMPTS]
            server.flush_cache()
            values += ask(server, PROMPTS)
        assert {mode for mode, count in steps.items() if count} == ({"tp", "sp"} if policy == "tokens" else {policy})
        for value, wanted in zip(values, expected * 2, strict=True):
            torch.testing.assert_close(torch.tensor(value), wanted, rtol=1e-4, atol=1e-4)


def ask(server: Any, ids: Any) -> Any:
    """Return what the server computes for one prompt or several."""
    answer = server.post("/encode", {"input_ids": ids})
    return [each["embedding"] for each in answer] if isinstance(answer, list) else answer["embedding"]


def test_a_calibration_chooses_the_modes(servers, tmp_path):
    """A model that pools has no decode steps, and is calibrated."""
    expected = make(tmp_path, KINDS["embeddings"])
    flags = ("--dtype", "float32", "--model-path", str(tmp_path), *TWO, "--is-embedding", "--enable-shift-parallel")
    server = servers.get(*flags)
    assert server.state["calibration"].startswith("calibrated in"), server.state
    for value, wanted in zip(ask(server, PROMPTS), expected, strict=True):
        torch.testing.assert_close(torch.tensor(value), wanted, rtol=1e-4, atol=1e-4)
