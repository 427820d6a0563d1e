"""Requests at the limits of a KV cache with pages of several tokens: none hangs, and none ends early."""

from __future__ import annotations

import pytest
from instance_trial import prompt, started, tokens_of_stock
from sglang_shift.models.demo import demo_model_path

FLAGS = ("--model-path", demo_model_path(), "--page-size", "16", "--max-total-tokens", "1008")
SMALL, LARGE = 496, 992  # tokens of an instance of one rank, and of two
REQUESTS = {
    "behind": (prompt(1, 20), 10),
    "beside": (prompt(2, SMALL - 13), 4),  # SGLang accepts it on one rank, and never admits it
    "near": (prompt(3, 441), 40),  # on one rank, it would end after 31 tokens
    "fits": (prompt(4, 441), 31),
}
ENDLESS = (prompt(5, 470), 5000)  # its prompt takes 480 tokens, in whole pages


@pytest.fixture(scope="module")
def alone():
    return tokens_of_stock(FLAGS, REQUESTS)


@pytest.fixture(scope="module")
def world():
    with started(2, FLAGS, instances=2) as started_world:
        assert started_world.call(capacity) == [SMALL, SMALL]
        yield started_world


@pytest.fixture(autouse=True)
def idle(world):
    yield
    world.renew()


def capacity(scheduler):
    return scheduler.max_total_num_tokens


def submit(world, *rids):
    for rid in rids:
        world.submit(0, rid, *REQUESTS[rid])


def test_a_prompt_that_one_rank_cannot_admit_is_refused_there(world, alone):
    submit(world, "beside", "behind")
    assert world.wait_end(["behind"])["behind"] == alone["behind"]
    world.wait_end(["beside"])
    reason = world.outputs["beside"].reason
    assert reason["type"] == "abort" and f"exceeds the maximum allowed length ({SMALL - 17} tokens)" in str(reason)


def test_two_ranks_answer_it(world, alone):
    world.merge()
    submit(world, "beside", "behind")
    assert world.wait_end() == {rid: alone[rid] for rid in ("beside", "behind")}


def test_a_prompt_that_all_ranks_cannot_admit_is_refused(world, alone):
    world.merge()
    world.submit(0, "too long", prompt(6, LARGE - 13), 4)
    submit(world, "behind")
    assert world.wait_end(["behind"])["behind"] == alone["behind"]
    world.wait_end(["too long"])
    assert world.outputs["too long"].reason["type"] == "abort"


def test_a_request_near_the_limit_prevents_the_split_and_gets_all_tokens(world, alone):
    world.merge()
    submit(world, "near")
    world.wait_tokens({"near": 3})
    refused = world.change(0, 2, 1)
    assert not refused.ok and "request near may need 488 tokens, and a part serves 479" in refused.reason
    assert world.wait_end() == {"near": alone["near"]}


def test_a_request_that_a_part_would_never_admit_prevents_the_split(world):
    """It has no limit that all ranks could serve, so it needs the tokens that it has."""
    world.merge()
    world.submit(0, "endless", *ENDLESS)
    world.wait_tokens({"endless": 12})
    refused = world.change(0, 2, 1)
    assert not refused.ok and "request endless may need" in refused.reason
    assert len(world.wait_end()["endless"]) == LARGE - 480 - 17, "what is free beside its prompt"


def test_a_request_that_just_fits_a_part_goes_on_there(world, alone):
    world.merge()
    submit(world, "fits", "behind")
    world.wait_tokens({"fits": 3})
    world.split()
    assert world.wait_end() == {rid: alone[rid] for rid in ("fits", "behind")}
