"""What each level costs: schedulers measure the steps of all levels and the changes between them at the start."""

from __future__ import annotations

import json

import pytest
from instance_trial import World, outputs_of_stock, prompt, started, tokens_of_batches
from sglang_shift.instances.messages import ChangeLevelReq, InstancesReady
from sglang_shift.models.demo import demo_model_path
from sglang_shift.modes import MODES, Mode

FLAGS = (
    "--model-path", demo_model_path(), "--max-total-tokens", "1023", "--max-running-requests", "4",
    "--chunked-prefill-size", "16", "--instance-policy", "auto", "--enable-mixed-chunk",
)  # fmt: skip


def calibration(scheduler):
    """The level whose calibration is in use, where it came from, and how long a step of one token takes by it."""
    selector = scheduler.shift_selector
    costs = selector.calibration.costs
    return (
        selector.calibration.key["level"],
        scheduler.shift_calibrator.text,
        selector.policy.costs.curves["decode"][Mode.TP](1) == costs.curves["decode"][Mode.TP](1),
        costs.curves["decode"][Mode.TP](1),
    )


def ready(world: World) -> InstancesReady:
    world.wait(lambda: any(isinstance(each, InstancesReady) for each in world.messages), "a message of rank 0")
    return next(each for each in world.messages if isinstance(each, InstancesReady))


def start(file):
    return started(2, (*FLAGS, "--shift-calibration", str(file)), instances=2, modes=())


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The name of the calibration. The files of both levels are measured once."""
    file = tmp_path_factory.mktemp("costs") / "own.json"
    with start(file) as world:
        message = ready(world)
        assert [text.partition(" in ")[0] for _, text, *_ in world.call(calibration)] == ["calibrated at level 1"] * 2
        assert world.problems() == []
    assert message.costs.levels.keys() == {1, 2}
    one, two = message.costs.levels[1], message.costs.levels[2]
    assert (one.modes, two.modes) == ((Mode.TP,), tuple(MODES))
    assert {1: one.tokens, 2: two.tokens} == message.capacities
    assert message.costs.changes.keys() == {(1, 2), (2, 1)} and min(message.costs.changes.values()) > 0
    return file


def test_each_level_has_a_file(file):
    assert sorted(each.name for each in file.parent.iterdir()) == ["own.1.json", "own.2.json"]
    keys = [json.loads(file.with_name(f"own.{level}.json").read_text())["key"] for level in (1, 2)]
    assert [key.pop("level") for key in keys] == [1, 2]
    assert keys[0]["tp_size"] == keys[1]["tp_size"] == 2


def test_modes_are_chosen_by_the_times_of_the_level(file):
    """The second start reads the files. After a change, each rank uses the file of its new level."""
    with start(file) as world:
        assert ready(world).costs.levels[2].costs.curves
        for level in (1, 2, 1):
            if level != 1 or world.leaders == [0]:
                assert world.change(0, 2, level).ok
            found = world.call(calibration)
            assert [each[0] for each in found] == [level] * 2
            assert all(text.startswith("calibration of") and f"own.{level}.json" in text for _, text, *_ in found)
            assert all(same for _, _, same, _ in found)
            world.submit(0, f"at {level}", prompt(level, 30), 12)
            assert len(world.wait_end([f"at {level}"])[f"at {level}"]) == 12
        assert world.problems() == []


def chunks(scheduler):
    """The level, and the steps with prompts that were chosen under the bound on gaps."""
    return scheduler.shift_switch.level, scheduler.shift_chunks.report()


def test_a_bound_on_gaps_holds_at_each_level(file):
    """Prompts of several chunks and running requests go from level to level. They get what they get on stock SGLang."""
    flags = (*FLAGS, "--shift-calibration", str(file), "--shift-tbt-target", "150")
    sent, seen = {}, []
    with started(2, flags, instances=2, modes=()) as world:
        for number, level in enumerate((1, 2, 1, 2)):
            for leader in world.leaders:
                for name, tokens, output in (("long", 120, 30), ("short", 9, 30), ("other", 20, 20)):
                    rid = f"{name} {number} {leader}"
                    sent[rid] = prompt(len(sent), tokens), output, {}
                    world.submit(leader, rid, sent[rid][0], output)
            world.wait_tokens({rid: 5 for rid in sent if rid.startswith(f"short {number}")})
            seen += world.call(chunks)
            assert world.change(0, 2, 3 - level).ok
        world.wait_end()
        assert world.problems() == []
    for level, report in seen:
        assert report["target_ms"] == 150 and sum(report["steps"].values()), f"nothing was bounded at level {level}"
    stock = outputs_of_stock(("--model-path", demo_model_path(), "--disable-overlap-schedule"), sent)
    for rid, expected in stock.items():
        assert world.outputs[rid].tokens == expected.tokens, rid


def test_a_part_of_a_split_that_splits_further_gets_no_large_request(file):
    with start(file) as world:
        ready(world)
        assert world.change(0, 2, 2).ok
        sizes = {"large 1": 300, "large 2": 200, "small 1": 20, "small 2": 20}
        for number, (rid, tokens) in enumerate(sizes.items()):
            world.submit(0, rid, prompt(number, 20), tokens)
        world.wait_tokens(dict.fromkeys(sizes, 2))
        world.epoch += 1
        world.send(0, ChangeLevelReq(world.epoch, 0, 2, 1, "a test", limits=(511, 100)))
        assert world.answer().ok
        first, second = world.call(tokens_of_batches)
        assert {"large 1", "large 2"} <= set(first) and not {"large 1", "large 2"} & set(second)
        assert {rid: len(tokens) for rid, tokens in world.wait_end().items()} == sizes
