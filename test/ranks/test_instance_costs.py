"""What each level costs: schedulers measure the steps of all levels and the changes between them at the start."""

from __future__ import annotations

import json
import re
import time

import pytest
from instance_trial import World, outputs_of_stock, prompt, started, tokens_of_batches
from sglang_shift.instances.messages import ChangeLevelReq, InstancesReady, StepsMeasured
from sglang_shift.models.demo import demo_model_path
from sglang_shift.modes import MODES, Mode
from sglang_shift.policy.selector import DRIFT_STEPS

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
    sent = {}
    start = prompt(99, 40)
    with started(2, flags, instances=2, modes=()) as world:
        world.submit(1, "start", start, 1)  # only this rank has it cached
        world.wait_end(["start"])
        for number, level in enumerate((1, 2, 1, 2)):
            before = world.call(chunks)
            for leader in world.leaders:
                for name, tokens, output in (("long", 90 + 40 * leader, 30), ("short", 9, 30), ("other", 20, 20)):
                    rid = f"{name} {number} {leader}"
                    sent[rid] = start * (name == "other") + prompt(len(sent), tokens), output, {}
                    world.submit(leader, rid, sent[rid][0], output)
            world.wait_tokens({rid: 5 for rid in sent if rid.startswith(f"short {number}")})
            for old, (now, report) in zip(before, world.call(chunks), strict=True):
                assert now == old[0] == level and report["target_ms"] == 150
                assert sum(report["steps"].values()) > sum(old[1]["steps"].values()), f"no bound at level {level}"
            assert world.change(0, 2, 3 - level).ok
        world.wait_end()
        assert world.problems() == []
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


@pytest.fixture
def wrong(file, tmp_path):
    """Files of both levels with a twentieth of the times."""
    for level in (1, 2):
        text = re.sub(
            r'"seconds": ([0-9.e-]+)', lambda m: f'"seconds": {float(m[1]) / 20}',
            file.with_name(f"own.{level}.json").read_text(),
        )  # fmt: skip
        content = json.loads(text)
        for curve in (curve for by_mode in content["costs"]["curves"].values() for curve in by_mode.values()):
            curve["values"] = [seconds / 20 for seconds in curve["values"]]
        (tmp_path / f"own.{level}.json").write_text(json.dumps(content))
    return tmp_path / "own.json"


def hurry(scheduler):
    """Look for drift early, and measure small steps only."""
    for calibrator in scheduler.shift_calibrators.values():
        calibrator._next_check = DRIFT_STEPS
        calibrator._shapes = [shape for shape in calibrator._shapes if shape.tokens <= 2]


def state(scheduler):
    """Whether the rank measures, and what it has: when each level was measured, and its time of a step."""
    levels = {level: each.calibration for level, each in scheduler.shift_calibrators.items()}
    return (
        scheduler.shift_calibrator.measuring,
        {level: (each.made, each.costs.curves["decode"][Mode.TP](1)) for level, each in levels.items()},
    )


class Drifting:
    """A world whose step times are wrong, and what it answers meanwhile."""

    def __init__(self, world: World) -> None:
        self.world, self.answers = world, {}
        self.old = ready(world).costs.levels
        world.call(hurry)

    def ask(self, leader: int, tokens: int = 12) -> None:
        """Ask for the same tokens as before. Each answer must begin alike."""
        rid = f"request {len(self.answers)}"
        self.world.submit(leader, rid, prompt(1, 30), tokens)
        self.answers[rid] = found = self.world.wait_end([rid])[rid]
        assert len(found) == tokens and found[:12] == next(iter(self.answers.values()))[:12]

    def drift(self, leader: int) -> None:
        """Run steps until the instance measures."""
        for _ in range(6):
            self.ask(leader, 200)
            time.sleep(0.3)
            if self.world.call(state)[leader][0]:
                return
        raise AssertionError(f"no calibration began:\n{self.world.tail()}")

    def wait(self, leader: int) -> StepsMeasured:
        """Ask from time to time, until the controller has new times."""
        self.world.messages.clear()
        end = time.monotonic() + 120
        while not (found := [each for each in self.world.messages if isinstance(each, StepsMeasured)]):
            assert time.monotonic() < end, self.world.tail()
            self.ask(leader)
            time.sleep(0.5)
        return found[0]


def test_a_merged_instance_whose_times_drift_measures_them_again(wrong):
    """A split stops it, and a merge lets it begin anew. In the end both ranks have the same times."""
    with start(wrong) as world:
        drifting = Drifting(world)
        before = world.call(state)
        assert world.change(0, 2, 2).ok
        drifting.drift(0)
        assert [measures for measures, _ in world.call(state)] == [True, True]
        assert world.change(0, 2, 1).ok
        assert [measures for measures, _ in world.call(state)] == [False, False]
        assert world.problems() == []
        drifting.ask(1)
        assert world.call(state) == before, "nothing is measured by a part"

        assert world.change(0, 2, 2).ok
        message = drifting.wait(0)
        (first, mine), (second, others) = world.call(state)
        assert (first, second) == (False, False) and mine == others
        assert mine[1] == before[0][1][1] and mine[2][1] > 4 * before[0][1][2][1]
        new = message.costs
        assert (new.ranks, new.tokens, new.modes) == (2, drifting.old[2].tokens, tuple(MODES))
        assert new.costs.curves["decode"][Mode.TP](1) == mine[2][1]
        level, text, used, seconds = world.call(calibration)[1]
        assert (level, used, seconds) == (2, True, mine[2][1]) and text.startswith("calibrated at level 2 in")
        assert json.loads(wrong.with_name("own.2.json").read_text())["made"] == mine[2][0]
        drifting.ask(0)
        assert world.problems() == []


def test_one_rank_measures_alone_while_its_neighbour_serves(wrong):
    """Then it has other times than its neighbour, and as part of a merged instance the same."""
    with start(wrong) as world:
        drifting = Drifting(world)
        before = world.call(state)
        drifting.drift(1)
        world.submit(0, "neighbour", prompt(2, 20), 200)  # too few steps for drift
        message = drifting.wait(1)
        (first, neighbour), (_, mine) = world.call(state)
        assert not first and neighbour == before[0][1]
        assert mine[2] == neighbour[2] and mine[1][1] > 4 * neighbour[1][1]
        assert (message.costs.ranks, message.costs.modes) == (1, (Mode.TP,))
        assert message.costs.costs.curves["decode"][Mode.TP](1) == mine[1][1]
        assert json.loads(wrong.with_name("own.1.json").read_text())["made"] == mine[1][0]

        world.wait_end(["neighbour"])
        assert world.change(0, 2, 2).ok
        used = world.call(calibration)
        assert used[0] == used[1] and used[0][0] == 2
        drifting.ask(0)
        assert world.change(0, 2, 1).ok
        assert [each[3] for each in world.call(calibration)] == [neighbour[1][1], mine[1][1]]
        for rank in (0, 1):
            drifting.ask(rank)
        assert world.problems() == []
