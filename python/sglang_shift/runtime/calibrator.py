"""The calibrator: gets a rank's cost model at the start, and a new one while the server idles."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel
from tqdm import tqdm

from sglang_shift.config import ShiftConfig
from sglang_shift.cost.calibration import Calibration, CalibrationError, cache_file, key_of, load, save
from sglang_shift.cost.measure import BUDGET_CPU, BUDGET_GPU, Measured, StepShape, grid, measure
from sglang_shift.modes import MODES, Mode
from sglang_shift.policy.selector import DRIFT_STEPS
from sglang_shift.runtime.calibration_key import place, settings_of
from sglang_shift.runtime.calibration_steps import SchedulerBench
from sglang_shift.seams import relies_on

logger = logging.getLogger(__name__)

TURN_SECONDS = 0.05
"""What one turn of an idle calibration takes; more, if one lap does."""


class Calibrator:
    """One per rank; every method is called by all ranks of a replica at the same point, and all go the same way.

    Args:
        scheduler: A :class:`sglang_shift.runtime.scheduler.ShiftScheduler`, built.
        config: The settings.
        chunk: Prompt tokens of the largest step.

    Attributes:
        text: Where the calibration came from, or why there is none.
        broken: A mode that failed while it was measured, or None.
    """

    def __init__(self, scheduler: Any, config: ShiftConfig, chunk: int) -> None:
        self.scheduler, self.config, self.chunk = scheduler, config, chunk
        self.bench = SchedulerBench(scheduler)
        self.text = "off"
        self.broken: Mode | None = None
        self._leads = get_parallel().tp_rank == 0
        self._path: Path | None = None
        self._calibration: Calibration | None = None  # the one in use
        self._running: Generator[None, None, None] | None = None
        self._interval = 2 * DRIFT_STEPS
        self._next_check = self._interval
        self._found = Measured()

    def start(self) -> Calibration | None:
        """The saved calibration, or one measured now; None where there is none to be had, with a log line."""
        if self.config.calibration == "off":
            return None
        self._shapes = self._agreed_grid()
        self._places = self.scheduler.tp_group.all_gather_object(place())
        self._calibration, self.text, measure_now = self._from_rank_0(self._load)
        if self._calibration is not None:
            self._log("sglang_shift: %s", self.text)
        elif self.text:
            self._warn(self.text)
        if measure_now:
            self._calibration = self._measure_all()
        return self._calibration

    def idle(self, steps: int, drifted: bool) -> Calibration | None:
        """Do a little while no request is in work; a new calibration, once one is complete.

        A drifted calibration is measured again, lap by lap: what a request that arrives has to wait for is a lap,
        or :data:`TURN_SECONDS` of small ones.

        Args:
            steps: Steps so far; with them, not with a clock, every rank knows when to look for drift.
            drifted: Whether this rank, if it measures drift at all, found any.
        """
        if self._running is None:
            if self._calibration is None or steps < self._next_check:
                return None
            self._next_check = steps + self._interval
        hindrance = self._hindrance()
        busy = not self.scheduler.is_fully_idle()
        any_drifted, any_hindered, any_busy = self.bench.agree([float(drifted), float(bool(hindrance)), float(busy)])
        if any_hindered:
            self._stop(hindrance)
        elif self._running is None and any_drifted:
            # Where a new calibration finds what the old one had, the reason is elsewhere: ask less often.
            self._interval *= 2
            self._next_check = steps + self._interval
            self._log("sglang_shift: calibrating again, as step times have drifted")
            self._running = self._measure()
        if self._running is None or any_busy:
            return None
        try:
            return self._turn(self._running)
        except CalibrationError as error:
            self._running = None
            self._log("sglang_shift: the new calibration failed, the old one stays: %s", error)
            return None

    def _turn(self, running: Iterator[None]) -> Calibration | None:
        """Some laps; the calibration, where they were the last ones. Afterwards all slots are free again."""
        end = self._found.seconds + TURN_SECONDS
        try:
            while self._found.seconds < end:
                next(running)
        except StopIteration:
            self._running = None
            return self._finish(self._renew)
        finally:
            self.bench.release()
        return None

    @relies_on(
        "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.begin_weight_update",
        "it notes the session during which no calibration may run",
    )
    @relies_on(
        "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.release_memory_occupation",
        "it notes the released memory without which no calibration may run",
    )
    def _hindrance(self) -> str:
        """Why no forward may run now, although no request is in work; empty if one may."""
        updater = self.scheduler.weight_updater
        if updater.offload_tags:
            return f"memory is released ({', '.join(sorted(updater.offload_tags))})"
        return "a weight update is open" if updater._session is not None else ""

    def _stop(self, why: str) -> None:
        """Give up the calibration that is running, if one is."""
        if self._running is not None:
            self._running.close()
            self._running = None
            self._log("sglang_shift: stopped calibrating, because %s; the old calibration stays", why)

    def _agreed_grid(self) -> list[StepShape]:
        """The shapes for the whole KV pool, the same on every rank: the least that any of them has room for."""
        scheduler = self.scheduler
        requests = min(scheduler.max_running_requests, scheduler.req_to_token_pool.available_size())
        slots = scheduler.token_to_kv_pool_allocator.available_size()
        requests, slots = (-int(number) for number in self.bench.agree([-requests, -slots]))
        return grid(self.chunk, requests, scheduler.model_config.context_len - 1, slots)

    def _load(self) -> tuple[Calibration | None, str, bool]:
        """On rank 0: what is saved, a text, and whether to measure."""
        settings = settings_of(self.scheduler, self.chunk, self._places)
        self._key = key_of(self.config, self.scheduler.model_config, settings)
        own_file = self.config.calibration != "auto"
        self._path = Path(self.config.calibration) if own_file else cache_file(self._key)
        try:
            calibration = load(self._path, self._key)
        except FileNotFoundError:
            return None, "", True
        except CalibrationError as error:
            return None, str(error), not own_file
        return calibration, f"calibration of {calibration.made} from {self._path}", False

    def _measure_all(self) -> Calibration | None:
        """Measure with a progress bar, at the start. A start does not fail because there is no calibration."""
        try:
            title = f"Calibrating {' and '.join(mode.name for mode in MODES)}"
            layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
            with tqdm(total=1.0, desc=title, bar_format=layout, disable=not self._leads) as bar:
                for _ in self._measure():
                    bar.update(self._found.part - bar.n)
                bar.update(1 - bar.n)
            return self._finish(self._fit)
        except CalibrationError as error:  # on every rank
            self.text, self.broken = str(error), error.broken
            self._warn(self.text)
        return None

    def _measure(self) -> Generator[None, None, None]:
        """Time the grid."""
        self._found = Measured()
        budget = BUDGET_GPU if torch.cuda.is_available() else BUDGET_CPU
        return measure(self.bench, self._shapes, budget, self._found)

    def _finish(self, make: Callable[[], Calibration]) -> Calibration:
        """Fit on rank 0, so that all ranks have the same floating-point numbers; keep it.

        Raises:
            CalibrationError: too little was measured; on every rank.
        """
        calibration, text, _ = self._from_rank_0(partial(self._kept, make))
        if calibration is None:
            raise CalibrationError(text)
        self.text, self._calibration = text, calibration
        self._log("sglang_shift: %s", text)
        return calibration

    def _fit(self) -> Calibration:
        return Calibration.of(self._key, self._found.seconds, self._found.steps, self._switch_seconds() or 0.0)

    def _renew(self) -> Calibration:
        assert self._calibration is not None
        return self._calibration.renewed(self._found.seconds, self._found.steps, self._switch_seconds())

    def _switch_seconds(self) -> float | None:
        return median(self._found.switches) if self._found.switches else None

    def _kept(self, make: Callable[[], Calibration]) -> tuple[Calibration | None, str, bool]:
        """Make the calibration and save it; what :meth:`_from_rank_0` wants."""
        assert self._path is not None
        found = self._found
        try:
            calibration = make()
        except CalibrationError as error:
            return None, str(error), False
        text = f"calibrated in {found.seconds:.1f} s ({len(found.steps)} measurements)"
        try:
            save(self._path, calibration)
        except CalibrationError as error:
            return calibration, f"{text}, not saved: {error}", False
        return calibration, f"{text}, saved as {self._path}", False

    def _from_rank_0(self, make: Any) -> Any:
        """What ``make`` returns on rank 0, on every rank."""
        outcome = None
        if self._leads:
            try:
                outcome = make()
            except Exception as error:  # the other ranks wait for an answer
                logger.exception("sglang_shift: calibration")
                outcome = None, f"{type(error).__name__}: {error}", False
        return self.scheduler.tp_group.broadcast_object(outcome, src=0)

    def _log(self, message: str, *args: Any) -> None:
        if self._leads:
            logger.info(message, *args)

    def _warn(self, message: str) -> None:
        if self._leads:
            logger.warning("sglang_shift: %s", message)
