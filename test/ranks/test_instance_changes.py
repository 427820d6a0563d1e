"""Schedulers that merge and split while requests run: each request gets the tokens that it gets alone on stock TP=1."""

from __future__ import annotations

import re

import pytest
from instance_trial import TrialError, World, prompt, started, tokens_of_stock
from sglang_shift.models.demo import demo_model_path

POOL = ("--max-total-tokens", "1023")  # with the slot that holds no token, a multiple of the ranks
MODEL = ("--model-path", demo_model_path())
# Numbers that name a rank, or a place in its memory; times; and those of parts that only report.
OF_A_RANK = re.compile(
    r"_group\.|rank|gpu_id|_node$|launch_ts|_time$|grammar_sync_entry|writer\.|reporter\.|shift_receipts\."
)
REQUESTS = {f"q{n}": (prompt(n, 20 + 7 * n), 40 + n) for n in range(6)}


@pytest.fixture(scope="module")
def alone():
    """The tokens of each request, one after the other on stock SGLang."""
    return tokens_of_stock((*MODEL, *POOL), REQUESTS)


def submit_all(world: World) -> None:
    for number, (rid, (ids, tokens)) in enumerate(REQUESTS.items()):
        world.submit(number % world.size, rid, ids, tokens)


@pytest.mark.parametrize("schedule", [(), ("--disable-overlap-schedule",)], ids=["overlap", "normal"])
def test_merge_and_split_with_requests_in_flight(alone, schedule):
    with started(2, (*MODEL, *POOL, *schedule), instances=2) as world:
        submit_all(world)
        world.wait_tokens(dict.fromkeys(REQUESTS, 5))
        merged = world.change(0, 2, 2)
        assert merged.ok and merged.tokens_recomputed == merged.tokens_dropped == 0 and merged.bytes_sent > 0
        world.wait_tokens(dict.fromkeys(REQUESTS, 15))
        split = world.change(0, 2, 1)
        assert split.ok and split.tokens_recomputed == split.tokens_dropped == 0 and split.bytes_sent > 0
        assert world.wait_end() == alone


def test_instances_that_do_not_merge_go_on(alone):
    """A step is in flight when the change is given up. SGLang must wait for its result, and for no other one."""
    with started(2, (*MODEL, *POOL), instances=2) as world:
        world.submit(1, "masks", prompt(50, 20), 12, return_sampling_mask=True)
        world.submit(1, "q1", *REQUESTS["q1"])
        world.wait_tokens({"masks": 3, "q1": 3})
        refused = world.change(0, 2, 2)
        assert not refused.ok and refused.reason == "request masks returns masks of sampling"
        world.wait_end(["masks", "q1"])
        world.submit(1, "q2", *REQUESTS["q2"])
        assert world.wait_end(["q1", "q2"]) == {rid: alone[rid] for rid in ("q1", "q2")}


def gauges(scheduler):
    """What SGLang's metrics say of this rank: its running requests, its queue, and the share of its cache in use."""
    collector = scheduler.metrics_reporter.metrics_collector
    found = (collector.num_running_reqs, collector.num_queue_reqs, collector.token_usage)
    return [sum(sample.value for metric in gauge.collect() for sample in metric.samples) for gauge in found]


def test_the_metrics_count_the_requests_of_a_merged_instance_once():
    with started(2, (*MODEL, *POOL, "--enable-metrics", "--decode-log-interval", "1"), instances=2) as world:
        for rank in (0, 1):
            world.submit(rank, f"q{rank}", prompt(rank, 20), 200)
        world.wait_tokens({"q0": 5, "q1": 5})
        assert [running for running, *_ in world.call(gauges)] == [1, 1]
        assert world.change(0, 2, 2).ok
        tokens = {rid: len(output.tokens) + 5 for rid, output in world.outputs.items()}
        world.wait_tokens(tokens)
        (running, _, usage), nothing = world.call(gauges)
        assert running == 2 and usage > 0 and nothing == [0, 0, 0]
        assert world.change(0, 2, 1).ok
        tokens = {rid: len(output.tokens) + 5 for rid, output in world.outputs.items()}
        world.wait_tokens(tokens)
        assert [running for running, *_ in world.call(gauges)] == [1, 1]


def numbers(scheduler):
    """The numbers that SGLang's scheduler and its parts keep from step to step."""
    parts = {"scheduler": scheduler, **vars(scheduler)}
    return {
        f"{part}.{name}": value
        for part, holder in parts.items()
        if type(holder).__module__.startswith(("sglang.", "sglang_shift.")) and hasattr(holder, "__dict__")
        for name, value in vars(holder).items()
        if isinstance(value, int | float)
    }


def limits(scheduler):
    """The limits of the outputs of the requests that wait, and which of them will be aborted."""
    params = {req.rid: req.sampling_params for req in scheduler.waiting_queue}
    aborted = [req.rid for req in scheduler.waiting_queue if req.to_finish is not None]
    return {rid: (each.max_new_tokens, each.min_new_tokens) for rid, each in params.items()}, aborted


def test_the_ranks_of_a_merged_instance_count_alike():
    """SGLang decides by some of these numbers. Before the merge, only one rank has a queue, and defers prefills.

    In the queue is a request that this rank will abort, because its prompt is too long. The other makes it again.
    """
    waits = ("--prefill-decode-interval", "60", "--prefill-decode-interval-min-bs", "1")  # until a batch has ended
    with started(2, (*MODEL, *POOL, *waits), instances=2) as world:
        for n in range(24):
            world.submit(0, f"queued {n}", prompt(n, 30), 40)
        world.submit(0, "too long", prompt(24, 600), 40)
        world.wait_tokens({"queued 4": 1})
        assert world.change(0, 2, 2).ok
        mine, others = world.call(numbers)
        different = {name for name in mine if mine[name] != others.get(name) and not OF_A_RANK.search(name)}
        assert not different, {name: (mine[name], others.get(name)) for name in different}
        mine, others = world.call(limits)
        assert mine == others and mine[1] == ["too long"]


def decide(scheduler, same):
    """Write a decision as a part of SGLang's does, for its rank-consensus checker."""
    from sglang.srt.utils import rank_consensus_checker as checker

    checker.assert_same("decision %s", 0 if same else scheduler.shift_switch.place.rank)
    return checker.enabled()


def test_the_ranks_of_an_instance_must_decide_alike_and_others_need_not():
    with started(2, (*MODEL, *POOL), instances=2) as world:
        assert world.call(decide, False) == [True, True], "the checker is on"
        submit_all(world)
        assert world.change(0, 2, 2).ok
        world.call(decide, True)
        assert world.change(0, 2, 1).ok
        world.call(decide, False)
        world.wait_end()
        assert world.change(0, 2, 2).ok
        with pytest.raises(TrialError, match="Found rank divergence"):
            world.call(decide, False)
            world.wait(lambda: False, "a rank that ends")
