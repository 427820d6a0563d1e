"""Four ranks that divide MLA's latents by token, with a bound on the gap between tokens: transformers' answers."""

from __future__ import annotations

import crowd
import pytest
import requests
import torch
from crowd import CROWDED, tokens
from families import Family, greedy, make_model
from prompts import LOGPROB_TOLERANCE, assert_same_answers
from tiny_models import LATENT

pytestmark = [pytest.mark.server, pytest.mark.full]

LENGTHS = [1, 2, 3, 5, 64, 201, 702, 1500]  # the last one takes two steps
CHUNK, ROWS, RANKS = 1024, 450, 4
FLAGS = (
    "--dtype", "float32", "--tp-size", str(RANKS), "--enable-shift-parallel", "--dcp-size", "auto",
    "--chunked-prefill-size", str(CHUNK), "--max-total-tokens", str(ROWS), *CROWDED,
)  # fmt: skip
DEEPSEEK = Family(
    "DeepseekV3Config",
    [],
    {
        **LATENT, "q_lora_rank": 32, "num_key_value_heads": 4, "first_k_dense_replace": 3,
        "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "max_position_embeddings": 2048,
        "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="module")
def model(folder):
    return make_model(str(folder / "model"), DEEPSEEK)


@pytest.fixture(scope="module")
def expected(model):
    return [greedy(model, tokens(length), 8) for length in LENGTHS]


@pytest.fixture(scope="module")
def generated(model):
    """The tokens of the streams and of the long prompts, by transformers with its cache.

    Each answer ends before the first token that rounding could change.
    """
    found = []
    for prompts, count in ((crowd.streams(), crowd.STREAM_TOKENS), (crowd.long_prompts(), crowd.LONG_TOKENS)):
        output = model.generate(
            torch.tensor(prompts), max_new_tokens=count, do_sample=False, eos_token_id=-1,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        first, second = torch.stack(output.logits, 1).topk(2).values.unbind(-1)
        sure = (first - second > 2 * LOGPROB_TOLERANCE).int().cumprod(1).sum(1)
        answers = output.sequences[:, len(prompts[0]) :].tolist()
        found += [answer[:length] for answer, length in zip(answers, sure.tolist(), strict=True)]
    return found


@pytest.fixture(scope="module")
def server(servers, folder, expected, generated):
    """It starts when the answers of transformers are known, because its ranks take all cores even if they are idle."""
    servers.stop()
    env = {"SGLANG_SHIFT_CACHE_DIR": str(folder / "cache")}
    return servers.get(*FLAGS, "--model-path", str(folder / "model"), env=env)


@pytest.mark.parametrize("policy", ["tp", "sp", "tokens"])
def test_same_tokens_and_logprobs(server, expected, policy):
    """Alone, and beside each other: one step then moves queries and latents."""
    prompts = [tokens(length) for length in LENGTHS]
    with server.policy(policy, threshold=64) as steps:
        answers = server.generate_all(prompts, 1) + server.generate_all(prompts, 8)
    assert_same_answers(answers, expected * 2)
    assert (steps["tp"] > 0, steps["sp"] > 0) == (policy != "sp", policy != "tp")


@pytest.mark.parametrize(("writer", "reader"), [("sp", "tp"), ("tp", "sp")])
def test_prefixes_from_the_radix_cache(server, expected, writer, reader):
    """A request hits what the other mode wrote, up to a page of four tokens, and continues it."""
    server.flush_cache()
    with server.policy(writer):
        for length in LENGTHS[5:]:
            server.generate(tokens(length)[: length // 2], 1)
    with server.policy(reader) as steps:
        answers = [server.generate(tokens(length)) for length in LENGTHS[5:]]
    for length, answer in zip(LENGTHS[5:], answers, strict=True):
        assert answer.meta["cached_tokens"] >= length // 2 - RANKS and answer.meta["cached_tokens"] % RANKS == 0
    assert steps[writer] == 0 < steps[reader]
    assert_same_answers(answers, expected[5:])


def test_capacity(server):
    """Exactly P times the tokens, in the bytes that the same rows take without shards."""
    info = requests.get(server.url + "/server_info", timeout=60).json()
    state = server.state
    assert info["max_total_num_tokens"] == state["kv_tokens"] == RANKS * ROWS
    assert state["kv_shards"] == info["dcp_size"] == RANKS
    layers, width, element = 3, LATENT["kv_lora_rank"] + LATENT["qk_rope_head_dim"], 4
    assert state["kv_bytes"] == (ROWS + 1) * layers * width * element


def test_everything_at_once(server, generated):
    """Chunks of the floor beside decodes, cached prefixes, retractions, and a mode that is switched from outside."""
    answers = crowd.answers_of(server, page=RANKS)
    assert [answer.tokens[: len(sure)] for answer, sure in zip(answers, generated, strict=True)] == generated
    asked = crowd.STREAMS * crowd.STREAM_TOKENS + 3 * crowd.LONG_TOKENS
    assert sum(map(len, generated)) > 0.8 * asked
