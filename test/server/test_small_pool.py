"""A KV pool that is too small: requests are retracted, and still answered as if they were not."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prompts import assert_same_answers

pytestmark = [pytest.mark.server, pytest.mark.full]

NEW_TOKENS = 120  # six requests of about 60 + 120 tokens do not fit a pool of 800


@pytest.fixture(scope="module")
def server(reference, servers):
    """Started as `sglang serve`: SGLang's command finds our flags."""
    return servers.get(
        "--dtype", "float32", "--tp-size", "2", "--enable-shift-parallel", "--shift-threshold", "6",
        "--max-total-tokens", "800", "--max-running-requests", "16", "--schedule-conservativeness", "0.01",
        module=[str(Path(sys.executable).parent / "sglang"), "serve"],
    )  # fmt: skip


def ask(server, ids):
    # SGLang reserves all tokens of a request that ignores the end of its text; only others can outgrow the pool.
    return server.generate(ids, NEW_TOKENS, sampling_params={"ignore_eos": False})


def staggered(server, prompts):
    """One request after the other, soon: each is admitted while those before it have grown little."""
    server.flush_cache()
    with ThreadPoolExecutor(len(prompts)) as pool:
        futures = []
        for ids in prompts:
            futures.append(pool.submit(ask, server, ids))
            time.sleep(0.06)
        return [future.result() for future in futures]


def test_retraction(server, reference):
    prompts = [ids for ids in reference.prompts if 40 < len(ids) < 80]
    server.flush_cache()
    with ThreadPoolExecutor(2) as pool:  # two fit
        calm = list(pool.map(lambda ids: ask(server, ids), prompts))
    assert not any(answer.meta["num_retractions"] for answer in calm)
    with server.policy("tokens", 6) as steps:
        crowded = staggered(server, prompts)
    assert sum(a.meta["num_retractions"] for a in crowded) > 0, "the pool was not too small"
    assert min(steps.values()) > 0
    assert_same_answers(crowded, calm)
