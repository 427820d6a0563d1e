"""The sockets of a rank that may lead an instance, and its messages to the controller.

Each rank has all sockets that SGLang gives to rank 0. A rank that follows does not read its input socket, because
SGLang asks for the rank's place at each step. It also must not send, so its senders are without a socket meanwhile.
Answers to control requests go to the controller (:mod:`sglang_shift.runtime.controller`), which waits for the answers
of all leaders.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import msgspec
from sglang.srt.managers.io_struct import BatchEmbeddingOutput, BatchTokenIDOutput, sock_send, wrap_as_pickle
from sglang.srt.managers.load_snapshot import LoadSnapshot
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper
from sglang.srt.observability.metrics_collector import QueueCount, SchedulerStats
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import PortArgs

from sglang_shift.instances.messages import RequestsEnded, ToController
from sglang_shift.runtime.read_receipts import ReceiptReader
from sglang_shift.runtime.reporter import StepReporter
from sglang_shift.seams import overrides, relies_on


def input_of(port_args: PortArgs, rank: int) -> str:
    """The address of the socket from which a rank reads what the controller sends."""
    return f"{port_args.scheduler_input_ipc_name}.{rank}"


def receipts_of(port_args: PortArgs) -> str:
    """The address of the socket on which a rank hears what the detokenizer has read of it."""
    return f"{port_args.scheduler_input_ipc_name}.read"


def answers_of(port_args: PortArgs) -> str:
    """The address of the socket from which the controller reads what the ranks send."""
    return f"{port_args.scheduler_input_ipc_name}.answers"


@relies_on(
    "sglang.srt.managers.scheduler_components.ipc_channels:SchedulerIpcChannels.create",
    "This method says what a scheduler uses each address for.",
)
def ports_of_rank(port_args: PortArgs, rank: int) -> PortArgs:
    """The addresses that a rank uses instead of those that all ranks share.

    Only rank 0 gets remote calls from the offline engine, as in a server without instances.
    """
    rpc = port_args.rpc_ipc_name
    return replace(
        port_args,
        scheduler_input_ipc_name=input_of(port_args, rank),
        tokenizer_ipc_name=answers_of(port_args),
        rpc_ipc_name=rpc if rank == 0 else f"{rpc}.{rank}",
    )


class ReportingSender(SenderWrapper):
    """Sends the outputs of a rank, and tells the controller which requests have ended with them.

    A receipt is due after each output.

    Args:
        socket: The socket that SGLang has made.
        channels: Sends the messages.
    """

    def __init__(self, socket: Any, channels: InstanceChannels) -> None:
        super().__init__(socket)
        self.channels = channels

    @overrides("Our method tells the controller which requests have ended.")
    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        super().send_output(output, recv_obj)
        self.channels.shift_receipts.due |= self.socket is not None
        if self.socket is not None and (message := ended(output)).rids:
            self.channels.tell_controller(message)


def ended(output: Any) -> RequestsEnded:
    """The requests that end with an output."""
    if not isinstance(output, BatchTokenIDOutput | BatchEmbeddingOutput):
        return RequestsEnded([])
    rids = output.rids or ()
    places = [i for i, reason in enumerate(output.finished_reasons) if reason is not None]
    generated = output.completion_tokens if isinstance(output, BatchTokenIDOutput) else ()
    return RequestsEnded([rids[i] for i in places], [generated[i] for i in places] if generated else [])


class InstanceChannels(Scheduler):
    """The part of our scheduler of instances that sends and receives. It comes before :class:`ShiftScheduler`."""

    shift_reporter: StepReporter | None
    shift_own_reporter: StepReporter | None = None
    make_reporter: Callable[[], StepReporter]
    ipc_channels: Any
    load_snapshot_writer: Any
    idle_sleeper: Any

    @overrides("Each rank may lead an instance, so each rank gets the sockets of rank 0.")
    def init_ipc_channels(self, port_args: PortArgs) -> None:
        """Open all sockets of a leader. ``port_args`` are those of :func:`ports_of_rank`."""
        with _as_rank_0():
            super().init_ipc_channels(port_args)
        channels = self.ipc_channels
        self.shift_answers = channels.send_to_tokenizer.socket
        sender = ReportingSender(channels.send_to_detokenizer.socket, self)
        self.ipc_channels = replace(channels, send_to_detokenizer=sender)
        self.shift_senders = {each: each.socket for each in (channels.send_to_tokenizer, sender)}
        self.shift_load_writer = self.load_snapshot_writer
        self.shift_receipts = ReceiptReader(sender.socket, receipts_of(port_args))

    @overrides("With --sleep-on-idle, each rank that leads an instance sleeps on its own sockets.")
    def init_idle_sleeper(self) -> None:
        with _as_rank_0():
            super().init_idle_sleeper()
        self.shift_idle_sleeper = self.idle_sleeper

    def lead(self, leads: bool) -> None:
        """Send, sleep and report as a leader from now on, or be silent as a rank that follows."""
        for sender, socket in self.shift_senders.items():
            sender.socket = socket if leads else None
        self.load_snapshot_writer = self.shift_load_writer if leads else None
        self.idle_sleeper = self.shift_idle_sleeper if leads else None
        metrics = self.metrics_reporter
        metrics.is_stats_logging_rank = leads
        metrics.current_scheduler_metrics_enabled = leads and metrics.enable_metrics
        if self.shift_own_reporter is None:
            self.shift_own_reporter = self.shift_reporter or self.make_reporter()
        self.shift_reporter = self.shift_own_reporter if leads else None
        if not leads:
            self._report_nothing()

    def _report_nothing(self) -> None:
        """Publish that this rank serves no requests of its own, because its leader reports them."""
        if self.shift_load_writer is not None:
            rank = self.shift_load_writer.dp_rank
            self.shift_load_writer.write(LoadSnapshot(timestamp=time.time(), dp_rank=rank))
        metrics = self.metrics_reporter
        if metrics.enable_metrics:
            none = QueueCount.from_reqs([], self.enable_priority_scheduling)
            metrics.stats = SchedulerStats(num_running_reqs=none, num_queue_reqs=none)
            metrics.metrics_collector.log_stats(metrics.stats)
        reporter = self.shift_own_reporter
        assert reporter is not None
        reporter.publisher.send(msgspec.structs.replace(reporter.state(), running=0, waiting=0))

    def tell_controller(self, message: ToController) -> None:
        """Send a message to the controller, also while this rank follows."""
        sock_send(self.shift_answers, wrap_as_pickle(message))


def _as_rank_0() -> AbstractContextManager[Any]:
    """Inside of this context, this rank is the first of the world for SGLang."""
    parallel = get_parallel()
    scope: AbstractContextManager[Any] = parallel.override(
        tp_rank=0, attn_tp_rank=0, moe_tp_rank=0, num_dp_ranks=parallel.tp_size
    )
    return scope
