"""Requests of an operator to the controller, and the controller's answers.

They travel on the sockets between the HTTP server and the controller, so they are messages of SGLang's kind.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import BaseReq, hook_custom_types
from sglang.srt.managers.load_snapshot import LoadSnapshot
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.runtime_context import get_parallel
from sglang.utils import TypeBasedDispatcher

from sglang_shift.resolution import shift_config_of
from sglang_shift.seams import overrides, relies_on

NO_INSTANCES = "this server has no instances to merge or split; start it with --instances"


class ChangeInstancesReqInput(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """Asks for instances of ``level`` ranks.

    Attributes:
        level: The ranks of each instance afterwards; None to change nothing, and only ask for the state.
        first: The first rank that changes.
        ranks: The number of ranks that change; None for all from ``first`` on.
        reason: Why, in words.
    """

    level: int | None = None
    first: int = 0
    ranks: int | None = None
    reason: str = "an operator"


class ChangeInstancesReqOutput(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """The answer.

    Attributes:
        success: Whether the instances are as they were asked for.
        message: What went wrong, in one sentence; else empty.
        report: The instances, and the changes that were made for the request.
    """

    success: bool
    message: str
    report: dict[str, Any]


@relies_on(
    "sglang.srt.managers.io_struct:hook_custom_types",
    "This function lets the sockets of this process carry other messages.",
)
def carry_messages() -> None:
    """Let the sockets of this process carry the messages above."""
    hook_custom_types(ChangeInstancesReqInput, ChangeInstancesReqOutput)


class InstanceRequests(TokenizerManager):
    """The part of our tokenizer manager that asks the controller for other instances."""

    shift_instances: FanOutCommunicator[Any] | None = None

    @overrides("With instances, our method lets this process ask the controller for others.")
    def init_communicators(self) -> None:
        super().init_communicators()
        config = shift_config_of(self.server_args)
        if config is None or not config.instances:
            return
        carry_messages()
        self.shift_instances = FanOutCommunicator(self._dispatch_to_scheduler, 1)
        self._result_dispatcher += TypeBasedDispatcher([(ChangeInstancesReqOutput, self.shift_instances.handle_recv)])

    @overrides("With instances, each rank reports a load, as a replica does.")
    def init_ipc_channels(self, port_args: Any) -> None:
        config = shift_config_of(self.server_args)
        replicas = config.world_size if config is not None and config.instances else get_parallel().num_dp_ranks
        with get_parallel().override(num_dp_ranks=replicas):
            super().init_ipc_channels(port_args)

    @overrides("With instances, each rank reports a load, but SGLang takes the server for one replica.")
    async def get_loads(self, include: list[str] | None = None, dp_rank: int | None = None) -> list[LoadSnapshot]:
        """The loads of all ranks, or of one."""
        loads: list[LoadSnapshot] = await super().get_loads(include)
        return [each for each in loads if dp_rank in (None, each.dp_rank)]

    async def change_instances(self, **values: Any) -> ChangeInstancesReqOutput:
        """Ask the controller. ``values`` are fields of :class:`ChangeInstancesReqInput`."""
        if self.shift_instances is None:
            return ChangeInstancesReqOutput(success=False, message=NO_INSTANCES, report={})
        self.auto_create_handle_loop()
        [answer] = await self.shift_instances(ChangeInstancesReqInput(**values))
        assert isinstance(answer, ChangeInstancesReqOutput)
        return answer
