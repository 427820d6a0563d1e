"""The calibrator: gets a rank's cost model at the start, and a new one while the server idles."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel, get_schedule
from tqdm import tqdm

from sglang_shift.bench import SchedulerBench
from sglang_shift.calibration import Calibration, CalibrationError, cache_file, key_of, load, save
from sglang_shift.config import ShiftConfig
from sglang_shift.measuring import BUDGET_CPU, BUDGET_GPU, Measured, grid, measure
from sglang_shift.modes import Mode
from sglang_shift.selector import DRIFT_STEPS

logger = logging.getLogger(__name__)


class Calibrator:
    """One per rank; every method is called by all ranks of a replica at the same point.

    Args:
        scheduler: A :class:`sglang_shift.scheduler.ShiftScheduler`, built.
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
        self._key: dict[str, Any] = {}
        self._path: Path | None = None
        self._running: Iterator[float] | None = None
        self._interval = 2 * DRIFT_STEPS
        self._next_check = self._interval
        self._found = Measured()

    def start(self) -> Calibration | None:
        """The saved calibration, or one measured now; None where there is none to be had, with a log line."""
        if self.config.calibration == "off":
            return None
        value, self.text, measure_now = self._from_rank_0(self._load)
        if value is not None:
            self._log("sglang_shift: %s", self.text)
            return Calibration.from_json(value)
        if self.text:
            self._warn(self.text)
        return self._measure_all() if measure_now else None

    def idle(self, steps: int, drifted: bool) -> Calibration | None:
        """Do a little while the server idles; a new calibration, once one is complete.

        Args:
            steps: Steps so far; with them, not with a clock, every rank knows when to look for drift.
            drifted: Whether this rank, if it measures drift at all, found any.
        """
        if self._running is None:
            if self.config.calibration == "off" or steps < self._next_check:
                return None
            self._next_check = steps + self._interval
            if not self.bench.agree([float(drifted)])[0]:
                return None
            # Where a new calibration finds what the old one had, the reason is elsewhere: ask less often.
            self._interval *= 2
            self._next_check = steps + self._interval
            self._log("sglang_shift: calibrating again, as step times have drifted")
            self._running = self._measure()
        try:
            next(self._running)
        except StopIteration:
            self._running = None
            return self._finish()
        except CalibrationError as error:
            self._running = None
            self._log("sglang_shift: the new calibration failed, the old one stays: %s", error)
        return None

    def _load(self) -> tuple[dict[str, Any] | None, str, bool]:
        """On rank 0: what is saved, a text, and whether to measure."""
        scheduler = self.scheduler
        settings = {
            "chunk": self.chunk,
            "max_running": scheduler.max_running_requests,
            "context_length": scheduler.model_config.context_len,
            "attention": type(scheduler.tp_worker.model_runner.attn_backend).__name__,
            "kv_cache_dtype": str(scheduler.tp_worker.model_runner.kv_cache_dtype),
            "page_size": get_schedule().page_size,
            "nodes": get_parallel().nnodes,
            "exchange": [self.config.exchange, self.config.exchange_dtype],
        }
        if captured := scheduler.tp_worker.model_runner.graphs.captured():
            settings["graphs"] = captured
        self._key = key_of(self.config, scheduler.model_config, settings)
        own_file = self.config.calibration != "auto"
        self._path = Path(self.config.calibration) if own_file else cache_file(self._key)
        try:
            calibration = load(self._path, self._key)
        except FileNotFoundError:
            return None, "", True
        except CalibrationError as error:
            return None, str(error), not own_file
        return calibration.to_json(), f"calibration of {calibration.made} from {self._path}", False

    def _measure_all(self) -> Calibration | None:
        """Measure with a progress bar, at the start."""
        try:
            layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
            with tqdm(total=1.0, desc="Calibrating TP and SP", bar_format=layout, disable=not self._leads) as bar:
                for part in self._measure():
                    bar.update(part - bar.n)
            return self._finish()
        except CalibrationError as error:
            self.text, self.broken = str(error), error.broken
            self._warn(self.text)
        except Exception as error:  # a start must not fail for want of a calibration
            self.text = f"the calibration failed ({type(error).__name__}: {error})"
            self._warn(self.text)
        return None

    def _measure(self) -> Iterator[float]:
        """Time the grid; yields the part done."""
        self._found = Measured()
        scheduler = self.scheduler
        requests = min(scheduler.max_running_requests, scheduler.req_to_token_pool.available_size())
        slots = scheduler.token_to_kv_pool_allocator.available_size()
        shapes = grid(self.chunk, requests, scheduler.model_config.context_len - 1, slots)
        budget = BUDGET_GPU if torch.cuda.is_available() else BUDGET_CPU
        return measure(self.bench, shapes, budget, self._found)

    def _finish(self) -> Calibration:
        """Fit on rank 0, so that all ranks have the same floating-point numbers; keep it."""
        value, self.text, _ = self._from_rank_0(self._fit)
        if value is None:
            raise CalibrationError(self.text)
        self._log("sglang_shift: %s", self.text)
        return Calibration.from_json(value)

    def _fit(self) -> tuple[dict[str, Any] | None, str, bool]:
        found = self._found
        assert self._path is not None
        try:
            switch = median(found.switches) if found.switches else 0.0
            calibration = Calibration.of(self._key, found.seconds, found.steps, switch)
        except CalibrationError as error:
            return None, str(error), False
        text = f"calibrated in {found.seconds:.1f} s ({len(found.steps)} measurements)"
        try:
            save(self._path, calibration)
        except CalibrationError as error:
            return calibration.to_json(), f"{text}, not saved: {error}", False
        return calibration.to_json(), f"{text}, saved as {self._path}", False

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
