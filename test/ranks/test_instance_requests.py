"""Requests of all kinds whose instance merges and splits: they get what they get alone on stock TP=1."""

from __future__ import annotations

import json

import pytest
from instance_trial import World, change_in_chunk, forget_prefixes, outputs_of_stock, prompt, started, tokens_of_batches
from sglang_shift.models.demo import demo_model_path

# With overlap scheduling, SGLang's penalties count other tokens if the steps of other requests come between.
FLAGS = (
    "--model-path", demo_model_path(), "--max-total-tokens", "1023", "--grammar-backend", "xgrammar",
    "--disable-overlap-schedule",
)  # fmt: skip
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "size": {"type": "integer"}},
        "required": ["name", "size"],
    }
)
REQUESTS = {
    "plain": (prompt(1, 33), 50, {}),
    "grammar": (prompt(2, 20), 40, {"json_schema": SCHEMA, "ignore_eos": False}),
    "penalties": (prompt(3, 25), 45, {"frequency_penalty": 0.7, "presence_penalty": 0.4, "min_new_tokens": 30}),
    "repetition": (prompt(4, 22), 45, {"repetition_penalty": 1.5, "min_new_tokens": 5, "ignore_eos": False}),
    "logprobs": (prompt(5, 30), 45, {"return_logprob": True}),
    "prompt logprobs": (prompt(6, 30), 45, {"return_logprob": True, "logprob_start_len": 0}),
    "no stream": (prompt(7, 27), 45, {"stream": False}),
    "namespace": (prompt(1, 33), 40, {"extra_key": "tenant", "cache_salt": "salt"}),
}
LONG = (prompt(20, 400), 30, {})


@pytest.fixture(scope="module")
def alone():
    """What each request gets, one after the other on stock SGLang."""
    return outputs_of_stock(FLAGS, {**REQUESTS, "long": LONG})


@pytest.fixture(scope="module")
def world():
    with started(2, FLAGS, instances=2) as started_world:
        yield started_world


@pytest.fixture(autouse=True)
def idle(world):
    """Each test ends with idle instances that lost nothing, and the next one begins without cached prefixes."""
    yield
    world.renew()


def submit(world: World, rank: int, rid: str) -> None:
    ids, tokens, options = LONG if rid == "long" else REQUESTS[rid]
    world.submit(rank, rid, ids, tokens, **options)


@pytest.mark.parametrize("first", [0, 1])
def test_all_kinds_of_requests(world, alone, first):
    """Each request begins on rank 0 and on rank 1, runs merged, and ends on one of them."""
    for number, rid in enumerate(REQUESTS):
        submit(world, (first + number) % 2, rid)
    streams = [rid for rid in REQUESTS if rid != "no stream"]
    world.wait_tokens(dict.fromkeys(streams, 4))
    assert world.merge().tokens_recomputed == 0
    world.wait_tokens(dict.fromkeys(streams, 14))
    assert world.split().tokens_recomputed == 0
    assert world.wait_end() == {rid: alone[rid].tokens for rid in REQUESTS}
    for rid in REQUESTS:
        output, expected = world.outputs[rid], alone[rid]
        assert output.reason == expected.reason
        assert output.decode_ids == expected.decode_ids, "the detokenizer gets each token once"
        assert output.retractions == 0
        assert output.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert output.input_logprobs[1:] == pytest.approx(expected.input_logprobs[1:], abs=1e-4)
    assert '"size" :' in decoded(world.outputs["grammar"].tokens), "the output follows the schema"


def decoded(tokens):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_path()).decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_prompt_between_two_chunks(world, alone, rank):
    from sglang_shift.instances.messages import ChangeLevelReq

    submit(world, 1 - rank, "plain")
    world.wait_tokens({"plain": 3})
    world.epoch += 1
    request = ChangeLevelReq(world.epoch, 0, 2, 2, "a test")
    world.send(rank, _call(change_in_chunk, request))
    submit(world, rank, "long")
    world.wait(lambda: any(getattr(each, "rank", None) == rank for each in world.messages), "the call")
    world.send(1 - rank, request)
    changed = world.answer()
    assert changed.ok and changed.tokens_recomputed == 0
    assert world.wait_end() == {rid: alone[rid].tokens for rid in ("plain", "long")}


def _call(function, *arguments):
    from instance_trial import Call

    return Call(function, arguments)


def test_cached_prefixes_survive(world, alone):
    """Prefixes of both instances are used after the merge, and after the split."""
    submit(world, 0, "plain")
    submit(world, 1, "penalties")
    world.wait_end()
    world.merge()
    for rid in ("plain", "penalties"):
        ids, tokens, options = REQUESTS[rid]
        world.submit(0, f"{rid} again", ids, tokens, **options)
    world.submit(0, "other namespace", REQUESTS["plain"][0], 5, extra_key="other")
    world.wait_end()
    for rid in ("plain", "penalties"):
        assert world.outputs[f"{rid} again"].tokens == alone[rid].tokens
        assert world.outputs[f"{rid} again"].cached == len(REQUESTS[rid][0]) - 1
    assert world.outputs["other namespace"].cached == 0
    world.split()
    world.submit(0, "left", REQUESTS["plain"][0], 5)
    world.submit(1, "right", REQUESTS["penalties"][0], 5)
    world.wait_end()
    assert world.outputs["left"].cached == len(REQUESTS["plain"][0]) - 1
    assert world.outputs["right"].cached == len(REQUESTS["penalties"][0]) - 1


def test_prefixes_of_both_instances_are_kept_once(world):
    for rank in (0, 1):
        world.submit(rank, f"r{rank}", prompt(9, 40), 10)
    world.wait_end()
    cached = world.call(cached_tokens)
    world.merge()
    assert cached[0] == cached[1]
    assert world.call(cached_tokens) == cached


def cached_tokens(scheduler):
    return scheduler.tree_cache.evictable_size()


@pytest.mark.parametrize("late", [False, True])
def test_an_abort_at_the_moment_of_the_merge(world, alone, late):
    from sglang.srt.managers.io_struct import AbortReq

    submit(world, 0, "plain")
    submit(world, 1, "no stream")
    submit(world, 1, "penalties")
    world.wait_tokens({"plain": 4, "penalties": 4})
    if late:  # the new leader gets it together with the request for the change
        world.ask(0, 2, 2)
        world.send(0, AbortReq(rid="penalties"))
    else:
        world.send(1, AbortReq(rid="penalties"))
        world.ask(0, 2, 2)
    assert world.answer().ok
    world.wait_end()
    assert world.outputs["penalties"].reason["type"] == "abort"
    assert len(world.outputs["penalties"].tokens) < 45
    for rid in ("plain", "no stream"):
        assert world.outputs[rid].tokens == alone[rid].tokens


def test_a_request_behind_the_change_is_handled_by_the_merged_instance(world):
    """It fits no instance before."""
    world.ask(0, 2, 2)
    world.submit(0, "longer", prompt(30, 700), 5)
    assert world.answer().ok
    world.wait_tokens({"longer": 1})
    world.wait_end()
    assert world.outputs["longer"].reason["type"] == "length"


def test_a_request_that_fits_no_part_prevents_the_split(world):
    world.merge()
    world.submit(0, "longer", prompt(31, 450), 200)
    world.wait_tokens({"longer": 1})
    refused = world.change(0, 2, 1)
    assert not refused.ok and "request longer may need 650 tokens" in refused.reason
    world.wait_end()
    world.split()


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("return_sampling_mask", "returns masks of sampling"),
        ("return_hidden_states", "returns hidden states, which SGLang does not continue"),
    ],
)
def test_a_request_that_cannot_travel_prevents_the_merge(world, alone, option, reason):
    world.submit(1, "stays", prompt(50, 20), 40, **{option: True})
    submit(world, 0, "plain")
    world.wait_tokens({"stays": 3, "plain": 3})
    refused = world.change(0, 2, 2)
    assert not refused.ok and refused.reason == f"request stays {reason}"
    world.wait_end(["stays"])
    world.merge()
    assert world.wait_end(["plain"]) == {"plain": alone["plain"].tokens}


def test_an_open_weight_update_prevents_the_split(world):
    world.merge()
    assert world.call(update_weights, "begin_weight_update") == [True, True]
    refused = world.change(0, 2, 1)
    assert not refused.ok and refused.reason == "a weight update is open"
    assert world.call(update_weights, "end_weight_update") == [True, True]
    world.split()


def update_weights(scheduler, method):
    """Begin or end a weight update without the controller, as a remote call of the offline engine does."""
    from sglang.srt.managers import io_struct

    begins = method == "begin_weight_update"
    request = io_struct.BeginWeightUpdateReqInput() if begins else io_struct.EndWeightUpdateReqInput()
    return getattr(scheduler.weight_updater, method)(request).success


def test_a_flush_forgets_the_namespaces(world):
    submit(world, 0, "namespace")
    world.wait_end()
    assert world.call(namespaces) == [[("tenant", "salt")], []]
    assert all(world.call(forget_prefixes))
    assert world.call(namespaces) == [[], []]


def namespaces(scheduler):
    return list(scheduler.tree_cache.shift_space_names)


def test_a_profile_prevents_the_split_until_it_ends(world, tmp_path):
    """It ends after some steps, and waits for all ranks that began it."""
    from sglang.srt.managers.io_struct import ProfileReq, ProfileReqOutput

    world.merge()
    values = {"output_dir": str(tmp_path), "activities": ["CPU"], "with_stack": False, "profile_id": "a"}
    world.send(0, ProfileReq(num_steps=4, **values))
    world.wait(lambda: any(isinstance(each, ProfileReqOutput) for each in world.messages), "the profile")
    refused = world.change(0, 2, 1)
    assert not refused.ok and "a profile runs or waits for a step" in refused.reason
    submit(world, 0, "plain")
    world.wait_end()
    assert len(list(tmp_path.glob("*.trace.json.gz"))) == 2
    world.split()


def test_a_change_is_given_up(world, alone):
    """One rank has no memory for the exchange. All go on as before."""
    submit(world, 0, "plain")
    submit(world, 1, "penalties")
    world.wait_tokens({"plain": 4, "penalties": 4})
    world.call(set_memory_problem, 1)
    refused = world.change(0, 2, 2)
    assert not refused.ok and refused.reason == "no memory on rank 1" and refused.bytes_sent == 0
    world.call(set_memory_problem, None)
    world.wait_tokens({"plain": 12, "penalties": 12})
    world.merge()
    assert world.wait_end() == {rid: alone[rid].tokens for rid in ("plain", "penalties")}


def set_memory_problem(scheduler, rank):
    from sglang_shift.runtime.level_change import LevelChange

    mine = scheduler.shift_switch.place.rank == rank
    LevelChange._memory_problem = lambda self: f"no memory on rank {rank}" if mine else None


def test_the_detokenizer_gets_the_tokens_of_both_leaders_in_order(world, alone):
    """It stands still while instances merge. Meanwhile the new leader must not send, as the old one's tokens wait."""
    for rid in ("plain", "penalties"):
        submit(world, 1, rid)
    world.wait_tokens({"plain": 4, "penalties": 4})
    world.look_away(0.2)
    world.ask(0, 2, 2)
    world.look_away(1.5)
    assert world.answer().ok
    assert world.wait_end() == {rid: alone[rid].tokens for rid in ("plain", "penalties")}
    for rid in ("plain", "penalties"):
        assert world.outputs[rid].decode_ids == alone[rid].decode_ids


def test_a_change_is_given_up_if_the_detokenizer_is_far_behind(world, alone):
    submit(world, 0, "plain")
    submit(world, 1, "penalties")
    world.wait_tokens({"plain": 4, "penalties": 4})
    assert world.call(set_patience, 0.3) == [10.0, 10.0]
    world.ask(0, 2, 2)
    world.look_away(1.5)
    refused = world.answer()
    assert not refused.ok and "the detokenizer is more than 0 s behind" in refused.reason
    world.call(set_patience, 10.0)
    world.merge()
    assert world.wait_end() == {rid: alone[rid].tokens for rid in ("plain", "penalties")}


def set_patience(scheduler, seconds):
    from sglang_shift.runtime import read_receipts

    before, read_receipts.PATIENCE_S = read_receipts.PATIENCE_S, seconds
    return before


def test_a_change_that_is_refused_leaves_requests_in_their_batches(world, alone):
    """Nothing is computed again, and no request goes through the queue."""
    world.merge()
    world.submit(0, "longer", prompt(31, 450), 200)
    submit(world, 0, "plain")
    world.wait_tokens({"longer": 1, "plain": 3})
    world.call(count_retractions)
    for _ in range(3):
        assert not world.change(0, 2, 1).ok
    assert world.call(count_retractions) == [0, 0]
    world.wait_end()
    assert world.outputs["plain"].tokens == alone["plain"].tokens


def count_retractions(scheduler):
    """How often the scheduler has emptied its batches since this function was called first."""
    from sglang_shift.runtime import level_change

    if not hasattr(level_change.retract, "calls"):
        original = level_change.retract

        def retract(*args):
            retract.calls += 1
            return original(*args)

        retract.calls = 0
        level_change.retract = retract
    return level_change.retract.calls


def test_ranks_sample_the_same_tokens_after_a_merge(world):
    """Each rank has drawn random numbers of its own before."""
    for rank in (0, 1):
        for number in range(rank + 1):
            world.submit(rank, f"s{rank}{number}", prompt(40 + rank + number, 25), 60, temperature=1.0)
    rids = list(world.outputs)
    world.wait_tokens(dict.fromkeys(rids, 5))
    world.merge()
    world.wait_tokens(dict.fromkeys(rids, 20))
    tokens = world.call(tokens_of_batches)
    assert tokens[0] == tokens[1] and set(tokens[0]) == set(rids)
    world.wait_end()


def test_new_weights_that_an_sp_step_has_gathered_reach_both_instances(world):
    """The first SP step after an update gathers the weights. Then the split must not find old rows of other ranks."""
    before = world.call(sums_of_tables)
    for number, factor in enumerate((2.0, 0.5)):
        world.merge()
        world.call(scale_shards, factor)
        world.submit(0, f"r{number}", prompt(60 + number, 30), 2)  # not cached, so it has enough tokens for SP
        world.wait_end()
        assert world.call(is_stale) == [False, False], "an SP step has run"
        world.split()
        scale = 2.0 if number == 0 else 1.0
        assert world.call(sums_of_tables) == [[scale * value for value in sums] for sums in before]


def scale_shards(scheduler, factor):
    """Write this rank's rows of the embedding and LM head, as a weight update of SGLang's does."""
    switch = scheduler.shift_switch
    parameters = [p for table in switch.weights.tables.values() for p in table.parameters(recurse=False)]
    for parameter in {id(p): p for p in parameters}.values():
        parameter.data.mul_(factor)
    switch.runner.base_weights.stale = True


def sums_of_tables(scheduler):
    """The sum of each embedding and LM head that this rank's instance uses."""
    names, model = scheduler.shift_switch.weights.tables, scheduler.tp_worker.model_runner.model
    return [float(dict(model.named_modules())[name].weight.abs().double().sum()) for name in names]


def is_stale(scheduler):
    return scheduler.tp_worker.model_runner.base_weights.stale


def test_a_grammar_that_one_instance_has_cached_is_asked_for_after_the_merge(world):
    """Ranks wait for each other where they compile a grammar. So one must not have it while the other compiles it."""
    submit(world, 0, "grammar")
    before = world.wait_end()["grammar"]
    world.merge()
    ids, tokens, options = REQUESTS["grammar"]
    world.submit(0, "again", ids, tokens, **options)
    assert world.wait_end(["again"]) == {"again": before}
