"""Adds our flags to SGLang's server arguments, and resolves their values."""

from __future__ import annotations

import argparse
import logging
from typing import Any, NoReturn

import msgspec
from sglang.srt.arg_groups.arg_utils import NS, A, Arg, add_cli_args_from_dataclass
from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.server_args import ServerArgs

from sglang_shift.args import config_file
from sglang_shift.args.chunk_size import adjust_chunk_size
from sglang_shift.args.cpu import check_cpu
from sglang_shift.args.dcp_size import check_dcp_size, resolve_dcp_size
from sglang_shift.args.exchange_pipeline import resolved_exchange_pipeline
from sglang_shift.args.gemm_backend import adjust_gemm_backend
from sglang_shift.args.graph_memory import adjust_graph_memory
from sglang_shift.args.instances import check_instance_model, check_instances, pool_fields
from sglang_shift.args.mixed_chunks import can_mix
from sglang_shift.args.model_check import check_model
from sglang_shift.args.refusals import check_flags, check_target
from sglang_shift.args.sp_size import auto_sp_size, check_sp_size
from sglang_shift.args.sparse_prefill import check_sparse_prefill
from sglang_shift.errors import ShiftError
from sglang_shift.flags import AUTO, BY_NAME, FLAGS, Flag, parse_ranks
from sglang_shift.graphs.plan import warning_without_graphs
from sglang_shift.models.demo import demo_model_path
from sglang_shift.parallel.exchange.choose import check_exchange
from sglang_shift.resolution import shift_config_of
from sglang_shift.seams import extends, overrides

logger = logging.getLogger(__name__)


def _field(flag: Flag) -> tuple[str, Any, Any]:
    """The name, annotation and default of a flag, as a field of SGLang's server arguments."""
    arg = Arg(
        help=flag.help,
        choices=list(flag.choices) or None,
        aliases=list(flag.aliases) or None,
        type_parser=flag.parse,
        resolvable=flag.resolvable,
    )
    if flag.type is bool:
        return flag.name, A[bool, arg, NS("shift")], False
    return flag.name, A[flag.type | None, arg, NS("shift")], None


Fields: Any = msgspec.defstruct("Fields", map(_field, FLAGS), bases=(ServerArgs,), dict=True)
"""SGLang's ``ServerArgs`` with an additional field for each of our flags."""


class ShiftServerArgs(Fields, dict=True):  # type: ignore[call-arg]
    """SGLang's ``ServerArgs`` with the fields of Shift Parallelism. The constructor takes a keyword for each field."""

    @overrides("The worker processes of --tokenizer-worker-num must check requests, too.")
    def get_tokenizer_worker_class(self) -> Any:
        """The class that SGLang runs in each worker process if ``--tokenizer-worker-num`` is above 1."""
        if shift_config_of(self) is None:
            return super().get_tokenizer_worker_class()
        from sglang_shift.runtime.tokenizer_manager import ShiftTokenizerWorker

        return ShiftTokenizerWorker

    @staticmethod
    @overrides("Our method adds our flags to SGLang's flags.")
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Add SGLang's flags, then our flags as a separate group."""
        ServerArgs.add_cli_args(parser)
        next(action for action in parser._actions if action.dest == "dcp_size").type = parse_ranks
        group = parser.add_argument_group("sglang_shift", "Shift Parallelism; without these, stock SGLang")
        add_cli_args_from_dataclass(group, ShiftServerArgs, fields=list(BY_NAME))


@extends(
    "sglang.srt.arg_groups.resolution_hooks:register_resolution_hook",
    "This step of SGLang is the first that reads --dcp-size, and it takes numbers only.",
)
@register_resolution_hook("handle_pd_disaggregation")
def resolve_token_shards(server_args: Any, previous: Any) -> None:
    """Replace ``--dcp-size auto`` by a number, then let SGLang go on.

    Raises:
        Refused: we do not serve this number; the error has the reason in one sentence.
    """
    if isinstance(server_args, ShiftServerArgs):
        resolve_dcp_size(server_args, uses_sp=shift_config_of(server_args) is not None)
    previous(server_args)


@extends(
    "sglang.srt.arg_groups.resolution_hooks:register_resolution_hook",
    "Our hook refuses settings that we do not serve, and records the effective values of our flags.",
)
@register_resolution_hook("handle_other_validations")
def resolve_shift(server_args: Any, previous: Any) -> None:
    """Refuse settings that we do not serve, and record the values of our flags that take effect.

    SGLang calls this hook. ``previous`` resolves SGLang's own settings first.

    Raises:
        Refused: we do not serve these settings; the error has the reason in one sentence.
    """
    previous(server_args)
    if not isinstance(server_args, ShiftServerArgs):
        return
    settings = resolving_view(server_args)
    check_sp_size(settings.sp_size)
    auto = chooses_sp_size(settings)
    if auto or settings.sp_size == AUTO:  # S is the largest candidate until the checks of the model have passed
        declare_resolution(server_args, "sglang_shift", sp_size=settings.tp_size)
    check_flags(settings)
    config = shift_config_of(server_args)
    if config is None:
        return
    check_target(settings, config)
    check_instances(settings, config)
    check_model(model_config_of(server_args), config, settings.enable_deterministic_inference)
    check_instance_model(model_config_of(server_args), config)
    check_dcp_size(settings, model_config_of(server_args))
    check_sparse_prefill(settings, model_config_of(server_args), config)
    pipeline, why_no_pipeline = resolved_exchange_pipeline(settings, model_config_of(server_args), config)
    if why_no_pipeline:
        logger.info("sglang_shift: The exchange is not pipelined, because %s.", why_no_pipeline)
    sp_size = config.sp_size
    if auto:
        decision = auto_sp_size(server_args)
        sp_size = decision.sp_size
        logger.info("sglang_shift: --sp-size auto: %s", decision.reason)
    adjust_gemm_backend(settings.device, settings.bf16_gemm_backend)
    check_cpu(settings)
    check_exchange(config, settings.device, sp_size, settings.nnodes)
    if config.policy != "tp":
        adjustment = adjust_chunk_size(server_args, sp_size)
        declare_resolution(server_args, "sglang_shift", **adjustment.fields)
        if auto or adjustment.fields:
            logger.info("sglang_shift: %s", adjustment.reason)
    adjustment = adjust_graph_memory(server_args, config)
    if adjustment.fields:
        declare_resolution(server_args, "sglang_shift", **adjustment.fields)
        logger.info("sglang_shift: %s", adjustment.reason)
    if config.tbt_target and can_mix(settings):
        declare_resolution(server_args, "sglang_shift", enable_mixed_chunk=True)
    if warning := warning_without_graphs(config, settings):
        logger.warning("sglang_shift: %s", warning)
    declare_resolution(
        server_args,
        "sglang_shift",
        sp_size=sp_size,
        shift_policy=config.policy,
        shift_threshold=config.threshold if config.policy in BY_NAME["shift_threshold"].policies else None,
        shift_calibration=config.calibration,
        shift_exchange_pipeline=None if pipeline == "off" else pipeline,
        **pool_fields(settings, config),
    )


def chooses_sp_size(settings: Any) -> bool:
    """Whether S follows from the model and the memory."""
    # With S = P every rank would hold whole layers, and might fail only after it loads them.
    return settings.sp_size == AUTO or (
        settings.sp_size is None and settings.enable_shift_parallel and settings.device != "cpu"
    )


class _Parser(argparse.ArgumentParser):
    """An argparse parser that reports a mistake in a ``--config`` file as one sentence."""

    file = ""

    def error(self, message: str) -> NoReturn:
        if self.file:
            raise ShiftError(f"--config {self.file}: {message[:400]}; correct it there")
        super().error(message)


def prepare_server_args(argv: list[str], prog: str = "python -m sglang_shift.launch_server") -> ShiftServerArgs:
    """Parse a command line as SGLang does, with its ``--config`` file. If neither names a model, use the demo model.

    Raises:
        SystemExit: argparse rejects a flag, and prints its own message.
        ShiftError: the ``--config`` file or ``--log-level`` has a mistake.
    """
    parser = _Parser(prog=prog)
    ShiftServerArgs.add_cli_args(parser)
    eviction_policy = parser.get_default("radix_eviction_policy")
    # If the value is None after parsing, neither the command line nor the file has the flag.
    parser.set_defaults(radix_eviction_policy=None)
    actions = {action.dest: action for action in parser._actions}
    actions["model_path"].required = False
    files: list[str] = []

    def record_file(path: str) -> str:
        files.append(path)
        return path

    actions["config"].type = record_file  # of two files, argparse would silently keep the last one

    namespace, command_line = parser.parse_args(argv), list(argv)
    if len(files) > 1:
        raise ShiftError(f"--config is given twice ({' and '.join(files)}); give one file")
    if files:
        parser.file = files[0]
        from_file = config_file.arguments(parser.file, parser)
        values = parser.parse_args(from_file)
        parser.file = ""
        namespace, command_line = parser.parse_args(argv, namespace=values), [*from_file, *argv]

    level = getattr(logging, namespace.log_level.upper(), None)
    if not isinstance(level, int):
        raise ShiftError(
            f"--log-level {namespace.log_level} is unknown; choose debug, info, warning, error or critical"
        )
    logging.basicConfig(level=level, format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S", force=True)
    if namespace.model_path is None:
        namespace.model_path = demo_model_path()
        logger.warning("sglang_shift: No model is named, so the demo model is served. For yours, give --model-path.")
    namespace._radix_eviction_policy_explicitly_set = namespace.radix_eviction_policy is not None
    if namespace.radix_eviction_policy is None:
        namespace.radix_eviction_policy = eviction_policy
    server_args = ShiftServerArgs.from_cli_args(namespace)
    from sglang.srt.sampling.watermarking.core import redact_watermark_command_line

    server_args._launch_command = redact_watermark_command_line(command_line, namespace.watermark_config)
    return server_args
