"""Rank 0 reports each step: an event, log lines, and the steps of each request by mode."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import msgspec
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_shift.cost.chunk_budget import FLOOR
from sglang_shift.modes import MODES, Mode
from sglang_shift.observe.events import META_INFO_KEY, SPARSE_KEY, Finished, Publisher, SparseFigures, StepEvent
from sglang_shift.policy.selector import Decision, Drift, ModeSelector
from sglang_shift.runtime.chunk_sizer import Chunk
from sglang_shift.runtime.stopwatch import Lap
from sglang_shift.runtime.token_gaps import TokenGaps
from sglang_shift.seams import overrides

logger = logging.getLogger(__name__)

SGLANG_BATCH_LINES = "sglang.srt.managers.scheduler_components.metrics_reporter"
DRIFT_LOG_STEPS = 64
"""Steps between checks for drift. Each check computes medians of hundreds of numbers."""
SWITCH_LOG_S = 5.0
"""Seconds between log lines about switches."""
FLOOR_LOG_S = 60.0
"""Seconds between log lines that say that a step takes longer than its budget."""
STATE_S = 1.0
"""Seconds between state events."""
MAX_IN_FLIGHT = 8
"""The most steps that may wait for their results. With overlap scheduling, two steps wait."""


@dataclass
class _StepInFlight:
    decision: Decision
    predicted: dict[Mode, float]
    lap: Lap | None
    replayed: bool | None
    chunk: Chunk | None
    sparse: bool


class StepReporter:
    """Follows steps from their launch to their results. Only rank 0 of a replica has a reporter.

    Args:
        selector: The mode selector, which decides and predicts.
        publisher: Sends the events.
        state: Makes a state event.
        exchange: The exchange counter, with ``bytes_sent`` and ``calls``.

    Attributes:
        drift: How far times have moved from those of the calibration in use.
        timed_reasons: Reasons for which a step needs TP although the calibration has timed such steps.
    """

    def __init__(self, selector: ModeSelector, publisher: Publisher, state: Any, exchange: Any) -> None:
        self.selector, self.publisher, self.state, self.exchange = selector, publisher, state, exchange
        self.drift = Drift()
        self.timed_reasons: frozenset[str | None] = frozenset({None})
        self.gaps = TokenGaps()
        self.batch_lines = BatchLines()
        self._in_flight: dict[int, _StepInFlight] = {}
        self._steps = 0
        self._state_due = 0.0
        self._switch_log_due = 0.0
        self._floor_log_due = 0.0
        self._switches_unlogged = 0
        self._drift_logged = False
        self._transferred: list[Any] = []

    def on_launch(
        self,
        forward_iter: int,
        decision: Decision,
        lap: Lap | None,
        replayed: bool | None,
        chunk: Chunk | None = None,
        *,
        sparse: bool = False,
    ) -> None:
        """Record that a step was launched.

        Args:
            forward_iter: SGLang's number of the step.
            decision: The mode of the step, and what it computes.
            lap: The time of the step, as soon as it is known.
            replayed: The field of :class:`StepEvent`.
            chunk: What was decided under a bound on the gap between tokens.
            sparse: Whether some of its chunks leave out blocks.
        """
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            self._in_flight.pop(next(iter(self._in_flight)))  # the result of this step never came
        self._in_flight[forward_iter] = _StepInFlight(
            decision, self.selector.predict(decision.step), lap, replayed, chunk, sparse
        )
        if chunk is not None and chunk.floor_rules:
            self._log_floor(chunk)

    def before_result(self, batch: Any) -> None:
        """Count the step for its requests, before SGLang processes its result and sends the new tokens."""
        in_flight = self._in_flight.get(batch.forward_iter)
        if in_flight is None:
            return
        mode = in_flight.decision.mode
        self.batch_lines.mode = mode
        for req in batch.reqs:
            if not req.finished():
                if not hasattr(req, "shift_steps"):
                    req.shift_steps = dict.fromkeys(MODES, 0)
                req.shift_steps[mode] += 1

    def after_result(self, batch: Any) -> None:
        """Publish the step, after SGLang has processed its result."""
        in_flight = self._in_flight.pop(batch.forward_iter, None)
        gaps = self.gaps.take(batch.reqs)
        if in_flight is None:
            return
        decision = in_flight.decision
        step, mode = decision.step, decision.mode
        if decision.probe:
            reason = f"a probe: what {mode.name} takes, beside the predicted time"
        elif step.needs_tp is not None:
            reason = step.needs_tp
        else:
            reason = self._explain(decision) if decision.switched else ""
        seconds = in_flight.lap.seconds if in_flight.lap is not None else None
        # Other steps compute more than those that the calibration timed.
        if seconds is not None and in_flight.predicted and step.needs_tp in self.timed_reasons:
            if not in_flight.sparse:  # the calibration timed exact chunks
                self.drift.add(mode, in_flight.predicted[mode], seconds, step.phase)
            chunk = in_flight.chunk
            if chunk is not None and chunk.uses_budget and not decision.probe:
                self.drift.add_chunk(chunk.predicted, seconds)
        self._steps += 1
        if self._steps % DRIFT_LOG_STEPS == 0:
            self._log_drift()
        self.publisher.send(
            StepEvent(
                time=time.time(),
                step=self._steps,
                mode=mode,
                phase=step.phase,
                tokens=step.num_tokens,
                prefill_tokens=step.num_prefill_tokens,
                running=step.num_running,
                waiting=step.num_waiting,
                pending_tokens=step.pending_prefill_tokens,
                seconds=seconds,
                predicted=in_flight.predicted,
                switched=decision.switched,
                reason=reason,
                exchanged_bytes=self.exchange.bytes_sent,
                exchanges=self.exchange.calls,
                finished=finished_requests([*self._transferred, *batch.reqs]),
                replayed=in_flight.replayed,
                chunk_room=in_flight.chunk.room if in_flight.chunk is not None else None,
                chunk_budget=in_flight.chunk.budget if in_flight.chunk is not None else None,
                gaps=gaps,
                replica=self.publisher.replica,
            )
        )
        self._transferred = []
        self.tick()

    def on_transfer(self, reqs: list[Any]) -> None:
        """Record that a prefill server has sent the KV cache of requests. The next step reports them."""
        self._transferred += reqs

    def tick(self) -> None:
        """Publish the state every :data:`STATE_S` seconds, for subscribers that connect late."""
        if (now := time.monotonic()) >= self._state_due:
            self._state_due = now + STATE_S
            self.publisher.send(self.state())

    def on_calibration(self) -> None:
        """Forget the measured drift, because a new calibration makes the predictions."""
        self.drift.clear()
        self._drift_logged = False
        self.publish_state()

    def on_level(self, drift: Drift) -> None:
        """Go on with the drift of another level, because its calibration makes the predictions."""
        self.drift, self._drift_logged = drift, False
        self.publish_state()

    def publish_state(self) -> None:
        """Publish the state at once, because the policy or the calibration has changed."""
        self._state_due = 0.0
        self.tick()

    def _explain(self, decision: Decision) -> str:
        try:
            reason = str(self.selector.policy.explain(decision.step, decision.mode))
        except Exception as error:  # a policy of the user may raise any error
            reason = f"the policy does not say ({type(error).__name__}: {error})"
        self._switches_unlogged += 1
        if (now := time.monotonic()) >= self._switch_log_due:
            self._switch_log_due = now + SWITCH_LOG_S
            more = (
                f" ({self._switches_unlogged} switches since the last such line)" if self._switches_unlogged > 1 else ""
            )
            logger.info("Switched to %s: %s%s", decision.mode.name, reason, more)
            self._switches_unlogged = 0
        return reason

    def _log_floor(self, chunk: Chunk) -> None:
        if (now := time.monotonic()) >= self._floor_log_due:
            self._floor_log_due = now + FLOOR_LOG_S
            logger.info(
                "%d prompt tokens beside %d decoding requests take %.0f ms, more than the %.0f ms that "
                "--shift-tbt-target leaves; a step never takes fewer than %d if more wait, so that prompts progress",
                chunk.tokens,
                chunk.decodes.requests,
                1e3 * chunk.predicted,
                1e3 * max(0.0, chunk.budget),
                FLOOR,
            )

    def _log_drift(self) -> None:
        if not self._drift_logged and self.drift.drifted:
            self._drift_logged = True
            ratios = {mode.name: self.drift.ratio(mode) for mode in MODES}
            ratios |= {f"{a.name} over {b.name} in a {phase}": off for (phase, a, b), off in self.drift.skews().items()}
            text = ", ".join(f"{m} {r:.2f} x" for m, r in ratios.items() if r is not None)
            logger.info("Step times have drifted from the predicted ones (median of the last steps): %s", text)


def finished_requests(reqs: list[Any]) -> list[Finished]:
    """The requests that finished with this step. Their times come from SGLang's time stamps."""
    finished = []
    for req in reqs:
        steps = getattr(req, "shift_steps", None)
        if steps is None or not req.finished() or hasattr(req, "shift_reported"):
            continue
        req.shift_reported = True
        times, count = req.time_stats, len(req.output_ids)
        queued = times.wait_queue_entry_time  # the last time, if it was retracted
        begin, first, end = times.scheduler_recv_time or queued, times.prefill_finished_time, times.completion_time
        if times.decode_prealloc_queue_entry_time > 0:  # a decode server gets the first token with the KV cache
            begin, first = times.decode_prealloc_queue_entry_time, queued
        end = end or time.perf_counter()
        if first <= 0 or begin <= 0:
            continue  # the request was aborted before its first token
        finished.append(
            Finished(
                prompt_tokens=len(req.origin_input_ids),
                output_tokens=count,
                ttft=first - begin,
                tpot=(end - first) / (count - 1) if count > 1 else None,
                e2e=end - begin,
                steps=steps,
                sparse=sparse_of(req),
            )
        )
    return finished


class BatchLines(logging.Filter):
    """Appends the mode to SGLang's ``Prefill batch`` and ``Decode batch`` log lines.

    Attributes:
        mode: The mode of the step that SGLang processes now.
    """

    mode: Mode | None = None

    def __init__(self) -> None:
        super().__init__()
        logging.getLogger(SGLANG_BATCH_LINES).addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Append the mode to a batch line. Every record passes the filter."""
        if self.mode is not None and str(record.msg).startswith(("Prefill batch", "Decode batch")):
            record.msg = f"{record.msg}, mode: {self.mode.name}"
        return True


class ShiftOutputStreamer(SchedulerOutputStreamer):
    """Sends the steps of each request by mode, and what it left out, for its ``meta_info``."""

    has_additional_customized_info = True

    @overrides("Our method sends the steps of each request by mode, and what it left out, for the request's meta_info.")
    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
        """``shift_steps`` of finished requests, and ``shift_sparse`` of those that may leave out blocks.

        SGLang needs a list, so each entry is a list of one.
        """
        info = {META_INFO_KEY: [[_steps_of(req)] if req.finished() else [] for req in reqs]}
        figures = [sparse_of(req) if req.finished() else None for req in reqs]
        if any(figures):
            info[SPARSE_KEY] = [[] if each is None else [msgspec.to_builtins(each)] for each in figures]
        return info


def _steps_of(req: Any) -> dict[str, int]:
    steps = getattr(req, "shift_steps", {})
    return {mode.value: steps.get(mode, 0) for mode in MODES}


def sparse_of(req: Any) -> SparseFigures | None:
    """What a request left out; None without ``--shift-sparse-prefill``."""
    sparse = getattr(req, "shift_sparse", None)
    return None if sparse is None else sparse.figures()
