"""The calibrator gives a rank its calibration at the start, and a new calibration while the server is idle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from sglang_shift.config import ShiftConfig
from sglang_shift.cost.calibration import Calibration, CalibrationError, cache_file, file_of_level, key_of, load, save
from sglang_shift.cost.compare_exchanges import compare_exchanges
from sglang_shift.cost.exchange_gain import ExchangeGain, first_tokens
from sglang_shift.cost.measure import BUDGET_CPU, BUDGET_GPU, Results, StepShape, grid, measure
from sglang_shift.modes import MODES, Mode
from sglang_shift.policy.selector import DRIFT_STEPS
from sglang_shift.runtime.calibration_key import host_and_links, settings_of
from sglang_shift.runtime.calibration_steps import SchedulerBench
from sglang_shift.seams import relies_on

logger = logging.getLogger(__name__)

TURN_SECONDS = 0.05
"""Seconds of one turn of an idle calibration. A turn is longer if one lap is."""


class Calibrator:
    """The calibrator of one rank.

    All ranks of a replica call each method at the same point, and take the same branches in it.

    Args:
        scheduler: A :class:`sglang_shift.runtime.scheduler.ShiftScheduler` that is built.
        config: The settings.
        chunk: Prompt tokens of the largest step.
        group: The ranks that calibrate together at the start; by default those of the replica or of the instance. The
            first one fits the curves.
        bench: Runs the steps; by default the scheduler's worker.
        level: With instances, the ranks of an instance whose steps are measured; by default all ranks of the world.

    Attributes:
        text: The source of the calibration, or the reason why there is none.
        failed_mode: A mode that failed during the measurement, or None.
    """

    def __init__(
        self,
        scheduler: Any,
        config: ShiftConfig,
        chunk: int,
        *,
        group: Any = None,
        bench: SchedulerBench | None = None,
        level: int | None = None,
    ) -> None:
        self.scheduler, self.config, self.chunk = scheduler, config, chunk
        self._group = group
        self.bench = bench or SchedulerBench(scheduler)
        self.level = (level or config.world_size) if config.instances else None
        self.text = "off"
        self.failed_mode: Mode | None = None
        self._calibration: Calibration | None = None
        self._path: Path | None = None
        self._measurement_run: Generator[None, None, None] | None = None
        self._interval = 2 * DRIFT_STEPS
        self._next_check = self._interval
        self._results = Results()
        self._exchange_gains: tuple[ExchangeGain, ...] = ()

    @property
    def calibration(self) -> Calibration | None:
        """The calibration in use, or None."""
        return self._calibration

    @property
    def measuring(self) -> bool:
        """Whether a calibration goes on whenever the server is idle."""
        return self._measurement_run is not None

    def start(self) -> Calibration | None:
        """Load the saved calibration, or measure a new one. If neither works, log why and return None."""
        if self.config.calibration == "off":
            return None
        self._shapes = self._agreed_grid()
        self._places = self._ranks.all_gather_object(host_and_links())
        self._calibration, self.text, measure_now = self._from_rank_0(self._load)
        self._path = self._ranks.broadcast_object(self._path, src=0)  # each rank may lead an instance
        if self._calibration is not None:
            self._log("sglang_shift: %s", self.text)
        elif self.text:
            self._warn(self.text)
        if measure_now:
            self._calibration = self._measure_all()
        elif self._calibration is not None:
            self._pipeline_from(self._calibration.pipelined_from)
        return self._calibration

    def idle(self, steps: int, drifted: bool) -> Calibration | None:
        """Continue a calibration while no request runs or waits. Return the new calibration once it is complete.

        If step times have drifted, the ranks measure again, lap by lap. A request that arrives waits for one lap, or
        for small laps of :data:`TURN_SECONDS` together.

        Args:
            steps: Steps so far; with instances, those since this level was entered. They tell every rank at the same
                point when to check for drift; a clock would not.
            drifted: Whether this rank has found drift. Only rank 0 measures drift.
        """
        if self._measurement_run is None:
            if self._calibration is None or steps < self._next_check:
                return None
            self._next_check = steps + self._interval
        hindrance = self._hindrance()
        busy = not self.scheduler.is_fully_idle()
        any_drifted, any_hindered, any_busy = self.bench.agree([float(drifted), float(bool(hindrance)), float(busy)])
        if any_hindered:
            self._stop(hindrance)
        elif self._measurement_run is None and any_drifted:
            # If new calibrations do not end the drift, they are not the remedy. So wait longer before the next one.
            self._interval *= 2
            self._next_check = steps + self._interval
            self._log("sglang_shift: calibrating again, as step times have drifted")
            self._measurement_run = self._measure()
        if self._measurement_run is None or any_busy:
            return None
        try:
            return self._run_turn(self._measurement_run)
        except CalibrationError as error:
            self._measurement_run = None
            self._log("sglang_shift: the new calibration failed, the old one stays: %s", error)
            return None

    def measure_in_instance(self) -> None:
        """From now on, the ranks of an instance calibrate together, and not all ranks of the world as at the start.

        The ranks of an instance are always the same ones at this level. So they have the same calibration, and count
        alike when to check for drift, whatever other instances do.
        """
        self._group = self.bench.cpu_group = None

    def leave(self, steps: int) -> None:
        """Stop a calibration that is running, because this rank goes to another level.

        When it comes back, steps count from 0 again. A calibration that was stopped begins anew if times still differ.

        Args:
            steps: Steps since this level was entered.
        """
        self._next_check = max(0, self._next_check - steps)
        if self.measuring:
            self._stop("the instance merges or splits")
            self._interval //= 2  # it says nothing about the drift
            self._next_check = 0

    def _run_turn(self, measurement_run: Iterator[None]) -> Calibration | None:
        """Run some laps. Return the calibration if they were the last laps. At the end all slots are free again."""
        end = self._results.seconds + TURN_SECONDS
        try:
            while self._results.seconds < end:
                next(measurement_run)
        except StopIteration:
            self._measurement_run = None
            return self._finish(self._renew)
        finally:
            self.bench.release()
        return None

    @relies_on(
        "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.begin_weight_update",
        "This method records an open weight update, during which no calibration may run.",
    )
    @relies_on(
        "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.release_memory_occupation",
        "This method records released memory, without which no calibration may run.",
    )
    def _hindrance(self) -> str:
        """Why no forward may run now, although the server is idle; empty if a forward may run."""
        updater = self.scheduler.weight_updater
        if updater.offload_tags:
            return f"memory is released ({', '.join(sorted(updater.offload_tags))})"
        return "a weight update is open" if updater._session is not None else ""

    def _stop(self, why: str) -> None:
        """Stop the calibration that is running, if there is one."""
        if self._measurement_run is not None:
            self._measurement_run.close()
            self._measurement_run = None
            self._log("sglang_shift: stopped calibrating, because %s; the old calibration stays", why)

    def _agreed_grid(self) -> list[StepShape]:
        """The shapes for the whole KV pool. The rank with the least room decides for all ranks."""
        scheduler = self.scheduler
        requests = min(scheduler.max_running_requests, scheduler.req_to_token_pool.available_size())
        slots = scheduler.token_to_kv_pool_allocator.available_size()
        requests, slots = (-int(number) for number in self.bench.agree([-requests, -slots]))
        return grid(self.chunk, requests, scheduler.model_config.context_len - 1, slots, scheduler.shift_width)

    def _load(self) -> tuple[Calibration | None, str, bool]:
        """On rank 0: the saved calibration or None, a text for the log, and whether to measure."""
        settings = settings_of(self.scheduler, self.chunk, self._places)
        if self.level is not None:
            settings["level"] = self.level
        self._key = key_of(self.config, self.scheduler.model_config, settings)
        own_file = self.config.calibration != "auto"
        self._path = self._own_path if own_file else cache_file(self._key)
        try:
            calibration = load(self._path, self._key)
        except FileNotFoundError:
            return None, "", True
        except CalibrationError as error:
            return None, str(error), not own_file
        return calibration, f"calibration of {calibration.made}{self._of_level} from {self._path}", False

    @property
    def _ranks(self) -> Any:
        """The ranks that calibrate together."""
        return self._group or self.scheduler.tp_group

    @property
    def _is_rank_0(self) -> bool:
        return bool(self._ranks.rank_in_group == 0)

    @property
    def _own_path(self) -> Path:
        """The file that the user has named. With instances, each level has a file of its own."""
        named = Path(self.config.calibration)
        return named if self.level is None else file_of_level(named, self.level)

    @property
    def _of_level(self) -> str:
        """Whose steps these are, for texts."""
        return "" if self.level is None else f" at level {self.level}"

    def _measure_all(self) -> Calibration | None:
        """Measure at the start, with a progress bar. The server starts even if the measurement fails."""
        try:
            title = f"Calibrating {' and '.join(mode.name for mode in MODES)}{self._of_level}"
            layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
            if self._times_pipeline:
                self._compare_exchanges()
            with tqdm(total=1.0, desc=title, bar_format=layout, disable=not self._is_rank_0) as bar:
                for _ in self._measure():
                    bar.update(self._results.progress - bar.n)
                bar.update(1 - bar.n)
            return self._finish(self._fit)
        except CalibrationError as error:  # every rank raises it
            self.text, self.failed_mode = str(error), error.broken
            self._warn(self.text)
            self._exchange_gains = ()
            self._pipeline_from(None)  # the comparison of the exchanges may have succeeded
        return None

    @property
    def _times_pipeline(self) -> bool:
        return self.config.exchange_pipeline == "auto"

    def _compare_exchanges(self) -> None:
        """Time the pipelined exchange beside the ordinary one. All steps from now on run in the way that is faster."""
        self._log("sglang_shift: The calibration first times the pipelined exchange.")
        pipeline = self.scheduler.tp_worker.model_runner.exchange_pipeline
        gains: list[ExchangeGain] = []
        laps = compare_exchanges(self.bench, self._shapes, lambda on: pipeline.starting_at(1 if on else None), gains)
        try:
            for _ in laps:
                pass
        except CalibrationError as error:  # every rank raises it
            gains.clear()
            self._warn(f"the exchange is not pipelined: {error}")
        self._exchange_gains = tuple(gains)
        self._pipeline_from(first_tokens(gains))

    def _pipeline_from(self, tokens: int | None) -> None:
        """Pipeline SP prefills of this number of tokens or more; with None, no step."""
        if self._times_pipeline:
            pipeline = self.scheduler.tp_worker.model_runner.exchange_pipeline
            pipeline.first_tokens = tokens
            self._log("sglang_shift: By the calibration, %s.", pipeline.text)

    def _measure(self) -> Generator[None, None, None]:
        self._results = Results()
        budget = BUDGET_GPU if torch.cuda.is_available() else BUDGET_CPU
        return measure(self.bench, self._shapes, budget, self._results)

    def _finish(self, make: Callable[[], Calibration]) -> Calibration:
        """Fit and save the calibration on rank 0, so that all ranks have the same floating-point numbers.

        Raises:
            CalibrationError: there are too few measurements. Every rank raises it.
        """
        calibration, text, _ = self._from_rank_0(partial(self._make_and_save, make))
        if calibration is None:
            raise CalibrationError(text)
        self.text, self._calibration = text, calibration
        self._log("sglang_shift: %s", text)
        return calibration

    def _fit(self) -> Calibration:
        calibration = Calibration.from_measurements(
            self._key, self._results.seconds, self._results.steps, self._switch_seconds() or 0.0
        )
        return replace(calibration, exchange_gains=self._exchange_gains)

    def _renew(self) -> Calibration:
        assert self._calibration is not None
        return self._calibration.with_measurements(self._results.seconds, self._results.steps, self._switch_seconds())

    def _switch_seconds(self) -> float | None:
        return median(self._results.switches) if self._results.switches else None

    def _make_and_save(self, make: Callable[[], Calibration]) -> tuple[Calibration | None, str, bool]:
        """Make the calibration and save it. The result has the form that :meth:`_from_rank_0` needs."""
        assert self._path is not None
        results = self._results
        try:
            calibration = make()
        except CalibrationError as error:
            return None, str(error), False
        text = f"calibrated{self._of_level} in {results.seconds:.1f} s ({len(results.steps)} measurements)"
        try:
            save(self._path, calibration)
        except CalibrationError as error:
            return calibration, f"{text}, not saved: {error}", False
        return calibration, f"{text}, saved as {self._path}", False

    def _from_rank_0(self, make: Any) -> Any:
        """Call ``make`` on rank 0, and return its result on every rank."""
        outcome = None
        if self._is_rank_0:
            try:
                outcome = make()
            except Exception as error:  # the other ranks wait for an answer
                logger.exception("sglang_shift: calibration")
                outcome = None, f"{type(error).__name__}: {error}", False
        return self._ranks.broadcast_object(outcome, src=0)

    def _log(self, message: str, *args: Any) -> None:
        if self._is_rank_0:
            logger.info(message, *args)

    def _warn(self, message: str) -> None:
        if self._is_rank_0:
            logger.warning("sglang_shift: %s", message)
