"""Measures what each level of instances costs: the times of its steps, and of the changes to other levels.

All ranks of the world measure together, before the server takes requests. The instances of a level run the same steps
at the same time, as they do under load, and the slowest rank counts. So each level has one calibration at the start.
Later, an instance whose step times drift measures the steps of its level again, on its own.
"""

from __future__ import annotations

from itertools import combinations, count
from typing import Any

import torch

from sglang_shift.cost.layouts import InstanceCosts
from sglang_shift.errors import InstanceRefused
from sglang_shift.instances.levels import Levels
from sglang_shift.instances.messages import ChangeLevelReq, LevelCosts
from sglang_shift.instances.prefix_tree import CachedPage, PrefixTree
from sglang_shift.modes import MODES, Mode
from sglang_shift.runtime.calibration_steps import SchedulerBench
from sglang_shift.runtime.calibrator import Calibrator
from sglang_shift.runtime.level_change import LevelChange

MOST_PAGES = 4096
"""Pages of KV cache that each instance brings into a merge that is measured, at most."""

END_PAGES = 64
"""Pages of each end of the prefix that these caches have."""

WITHOUT_TIMES = (
    "--instance-policy auto needs the step times of each level, and there are none for instances of {level} ranks: "
    "{reason}; give --instance-policy paper, or another --shift-calibration"
)
NO_CHANGE = "--instance-policy auto cannot measure how long instances take to change: {reason}; give fixed or paper"


class LevelBench(SchedulerBench):
    """Runs steps at the level that the scheduler has now. At the start, all ranks of the world run them together."""

    def run(self, mode: Mode, after: Mode | None = None) -> float:
        """Run one step. If S is 1, nothing is exchanged, so a step in SP is a step in TP."""
        if not self.scheduler.shift_switch.place.has_sp:
            mode, after = Mode.TP, after and Mode.TP
        return super().run(mode, after)


class LevelMeasurements:
    """The measurements of one rank. They move the ranks through all levels, and are collective.

    Args:
        scheduler: A :class:`sglang_shift.runtime.instance_scheduler.InstanceScheduler` at the lowest level, with an
            empty KV cache. It is left as it was.
        levels: The levels of the world.

    Attributes:
        calibrators: The calibrator of each level.
    """

    def __init__(self, scheduler: Any, levels: Levels) -> None:
        self.scheduler, self.levels = scheduler, levels
        self.calibrators: dict[int, Calibrator] = {levels.world_size: scheduler.shift_calibrator}
        self._world = scheduler.shift_switch.places[levels.world_size].group
        self._bench = self._world_bench()
        self._epochs = count(-1, -1)  # those of real changes rise from 1

    def calibrate(self) -> None:
        """Load or measure the step times of all levels below the highest, which the scheduler has calibrated."""
        scheduler = self.scheduler
        for level in self.levels.sizes[:-1]:
            if scheduler.shift_switch.pages is not None and level > self.levels.lowest:
                continue  # its ranks lack weights for SP, so there is nothing to choose
            self._go_to(level)
            calibrator = Calibrator(
                scheduler, scheduler.shift_config, scheduler.shift_chunk,
                group=self._world, bench=self._world_bench(), level=level,
            )  # fmt: skip
            calibrator.start()
            calibrator.measure_in_instance()
            self.calibrators[level] = calibrator
        self._go_to(self.levels.lowest)

    def _world_bench(self) -> LevelBench:
        return LevelBench(self.scheduler, self._world.cpu_group)

    def costs(self) -> LevelCosts:
        """What a policy needs to compare layouts.

        Raises:
            InstanceRefused: a level has no calibration.
        """
        scheduler, layout = self.scheduler, self.scheduler.shift_switch.pool.layout
        costs = {}
        for level, calibrator in sorted(self.calibrators.items()):
            if calibrator.calibration is None:
                raise InstanceRefused(WITHOUT_TIMES.format(level=level, reason=calibrator.text))
            costs[level] = InstanceCosts(
                level,
                calibrator.calibration.costs,
                layout.tokens(level),
                modes=tuple(MODES) if scheduler.shift_switch.places[level].has_sp else (Mode.TP,),
                chunk=scheduler.shift_chunk,
                max_running=scheduler.max_running_requests,
            )
        return LevelCosts(costs, self._change_seconds())

    def _change_seconds(self) -> dict[tuple[int, int], float]:
        """Seconds of a change from each level to each other one, on the slowest rank.

        Raises:
            InstanceRefused: a change cannot be made.
        """
        found = {}
        for low, high in combinations(self.levels.sizes, 2):
            self._go_to(low)
            self._fill()
            found[low, high] = self._change(high, high)
            found[high, low] = self._change(high, low)
        self._go_to(self.levels.lowest)
        return found

    def _change(self, ranks: int, level: int) -> float:
        place = self.scheduler.shift_switch.places[ranks]
        request = ChangeLevelReq(next(self._epochs), place.instance.leader, ranks, level, "to measure the time")
        report = LevelChange(self.scheduler, request, []).run()
        if not report.ok:
            raise InstanceRefused(NO_CHANGE.format(reason=report.reason))
        return self._bench.agree([sum(report.phases.values())])[0]

    def _fill(self) -> None:
        """Cache made-up prefixes, which differ from those of other instances. They take half of the cache at most.

        Half of their pages are one long prefix, and the others are ends of it, as with conversations that begin alike.
        """
        switch, cache = self.scheduler.shift_switch, self.scheduler.tree_cache
        layout, leader = switch.pool.layout, switch.place.instance.leader
        count = min(MOST_PAGES, layout.last_page(switch.level) // 2)
        trunk = count // 2

        def cached(page: int) -> CachedPage:
            parent = trunk if page > trunk and (page - trunk) % END_PAGES == 1 else page - 1
            token = leader + page * self.levels.world_size
            return CachedPage(page, parent, (token,) * layout.page_size, (None, None))

        tree = PrefixTree(cached(page) for page in range(1, count + 1))
        cache.write(tree)
        switch.pool.keep(torch.tensor(sorted(tree.pages), dtype=torch.int64))

    def _go_to(self, level: int) -> None:
        """Go to a level with an empty KV cache."""
        scheduler = self.scheduler
        scheduler.shift_switch.enter(level)
        scheduler.tree_cache.reset()
        scheduler.enter_instance(next(self._epochs))
