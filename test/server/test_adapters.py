"""LoRA adapters: steps with an active adapter run in TP, all other steps run in the mode that the policy chooses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adapters import EMBEDDING, merge_adapter, write_adapter
from harness import TWO_RANKS, Answer, Server
from prompts import assert_same_answers
from transformers import AutoModelForCausalLM
from two_layers import two_layer_model

TOKENS = 8
FEW = ("q_proj", "v_proj", "down_proj", EMBEDDING)  # SGLang asks for both projections of q and v


def base_model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(two_layer_model(), dtype=torch.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of two adapters, by name. They differ in rank, and in the layers that they change."""
    root, model = tmp_path_factory.mktemp("adapters"), base_model()
    return {
        "all-linears": write_adapter(root / "a", model, rank=8, seed=1),
        "few-layers": write_adapter(root / "b", model, rank=4, seed=2, targets=FEW),
    }


@pytest.fixture(scope="module")
def flags(folders):
    return ("--lora-paths", *(f"{name}={folder}" for name, folder in folders.items()))


@pytest.fixture(scope="module")
def asked(reference, folders):
    """Prompts with their adapters. A third of them has none."""
    names = [None, *folders]
    return [(ids, names[i % 3]) for i, ids in enumerate(reference.prompts[12:60:2])]


@pytest.fixture(scope="module")
def expected(servers, asked, flags):
    """The answers of a stock server with the same adapters."""
    server = servers.get("--dtype", "float32", "--tp-size", "2", *flags)
    return answers(server, asked, 8)


@pytest.fixture(scope="module")
def server(expected, servers, flags):
    return servers.get(*TWO_RANKS, *flags)


def answers(server: Server, asked: list[tuple[list[int], str | None]], concurrency: int) -> list[Answer]:
    server.flush_cache()
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda each: server.generate(each[0], TOKENS, lora_path=each[1]), asked))


@pytest.mark.server
def test_the_reference_is_the_merged_model(expected, asked, folders):
    """Stock SGLang's LoRA on this platform computes what transformers computes with merged weights."""
    for name in (None, *folders):
        model = base_model() if name is None else merge_adapter(base_model(), folders[name])
        mine = [(ids, answer) for (ids, adapter), answer in zip(asked, expected, strict=True) if adapter == name]
        for ids, answer in mine[::2]:
            logits = model(torch.tensor([ids + answer.tokens[:-1]])).logits[0, len(ids) - 1 :]
            assert logits.argmax(-1).tolist() == answer.tokens, (name, len(ids))


@pytest.mark.server
@pytest.mark.parametrize("policy", ["tp", "sp", "tokens"])
def test_adapters_and_none_at_concurrency_8(server, asked, expected, policy):
    with server.policy(policy, threshold=64) as steps:
        assert_same_answers(answers(server, asked, 8), expected)
        bare = [(each, answer) for each, answer in zip(asked, expected, strict=True) if each[1] is None]
        assert_same_answers(answers(server, [each for each, _ in bare], 1), [answer for _, answer in bare])
    assert steps["tp"] > 0
    assert (steps["sp"] > 0) == (policy != "tp")


@pytest.mark.server
def test_the_adapter_decides_whatever_the_policy_is(server, asked, expected):
    with server.policy("sp") as steps:
        assert_same_answers(answers(server, asked[1:3], 2), expected[1:3])
    assert steps["sp"] == 0 < steps["tp"]
    with server.policy("sp") as steps:
        assert_same_answers(answers(server, asked[:1], 1), expected[:1])
    assert steps == {"tp": 0, "sp": TOKENS}


@pytest.mark.server
def test_adapters_come_and_go_while_requests_run(server, asked, expected, folders):
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(answers, server, asked[:2] * 4, 4)
        for _ in range(2):
            assert server.post("/unload_lora_adapter", {"lora_name": "few-layers"})["success"]
            body = {"lora_name": "few-layers", "lora_path": folders["few-layers"]}
            assert server.post("/load_lora_adapter", body)["success"]
        assert_same_answers(running.result(), expected[:2] * 4)
    with server.policy("sp") as steps:
        assert_same_answers(answers(server, asked, 8), expected)
        assert_same_answers(answers(server, asked[:1], 1), expected[:1])  # without an adapter, so in SP
    assert min(steps.values()) > 0


@pytest.mark.server
@pytest.mark.full
def test_sp_alone(servers, asked, expected, flags):
    """Without switching, steps with an adapter run in TP, and all others in SP."""
    server = servers.get("--dtype", "float32", "--tp-size", "2", "--sp-size", "2", *flags)
    before = server.state["steps"]
    assert_same_answers(answers(server, asked, 8), expected)
    middle = server.state["steps"]
    assert middle["tp"] > before["tp"]
    assert_same_answers(answers(server, asked[:1], 1), expected[:1])
    assert server.state["steps"] == {"tp": middle["tp"], "sp": middle["sp"] + TOKENS}
