"""SGLang's server arguments with ours: flags, defaults and resolution."""

from __future__ import annotations

import argparse
import logging
from typing import Any, Optional

from sglang.srt.arg_groups.arg_utils import NS, A, Arg, add_cli_args_from_dataclass
from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.server_args import ServerArgs

from sglang_shift.config import DEFAULT_THRESHOLD, shift_config_of
from sglang_shift.demo import demo_model_path
from sglang_shift.modes import POLICIES
from sglang_shift.refusals import check_flags, check_model

FIELDS = ["sp_size", "enable_shift_parallel", "shift_policy", "shift_threshold"]


class ShiftServerArgs(ServerArgs, dict=True):  # type: ignore[call-arg]
    """SGLang's ``ServerArgs`` and the fields of Shift Parallelism. Same constructor keywords."""

    # Optional[...] rather than `| None`: SGLang's parser builder reads the annotations.
    sp_size: A[
        Optional[int],  # noqa: UP045
        Arg(
            help="Ulysses sequence parallelism over S ranks; S divides --tp-size P and the base configuration "
            "is SP=S, TP=P/S. Alone: every step runs in it. Default with --enable-shift-parallel: P.",
            aliases=["--sequence-parallel-size"],
            resolvable=True,
        ),
        NS("shift"),
    ] = None
    enable_shift_parallel: A[
        bool,
        Arg(
            help="Shift Parallelism: each step runs in full tensor parallelism (TP) or in the base configuration "
            "(SP), as --shift-policy decides."
        ),
        NS("shift"),
    ] = False
    shift_policy: A[
        Optional[str],  # noqa: UP045
        Arg(
            help="With --enable-shift-parallel, how a step's mode is chosen. tokens (default): SP when the step "
            "has more than --shift-threshold tokens. tp, sp: that mode for every step.",
            choices=list(POLICIES),
            resolvable=True,
        ),
        NS("shift"),
    ] = None
    shift_threshold: A[
        Optional[int],  # noqa: UP045
        Arg(
            help=f"Tokens in a step above which the tokens policy runs it in SP. Default: {DEFAULT_THRESHOLD}.",
            resolvable=True,
        ),
        NS("shift"),
    ] = None

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Add SGLang's flags, then ours in a group of their own."""
        ServerArgs.add_cli_args(parser)
        group = parser.add_argument_group("sglang_shift", "Shift Parallelism; without these, stock SGLang")
        add_cli_args_from_dataclass(group, ShiftServerArgs, fields=FIELDS)


@register_resolution_hook("handle_other_validations")
def resolve_shift(server_args: Any, previous: Any) -> None:
    """Refuse what is not served, and record the effective values, once SGLang's own are known.

    Raises:
        Refused: with the reason, in one sentence.
    """
    previous(server_args)
    if not isinstance(server_args, ShiftServerArgs):
        return
    settings = resolving_view(server_args)
    check_flags(settings)
    config = shift_config_of(server_args)
    if config is None:
        return
    check_model(model_config_of(server_args), config)
    declare_resolution(
        server_args,
        "sglang_shift",
        sp_size=config.sp_size,
        shift_policy=config.policy,
        shift_threshold=config.threshold if config.policy == "tokens" else None,
    )


def prepare_server_args(argv: list[str], prog: str = "python -m sglang_shift.launch_server") -> ShiftServerArgs:
    """Parse a command line as SGLang does; without ``--model-path`` the demo model is served.

    Raises:
        SystemExit: argparse's, with its message, on a bad flag.
    """
    parser = argparse.ArgumentParser(prog=prog)
    ShiftServerArgs.add_cli_args(parser)
    if any(arg == "--config" or arg.startswith("--config=") for arg in argv):
        from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

        argv = ConfigArgumentMerger(parser).merge_config_with_args(argv)
    if not names_model(argv):
        argv = [*argv, "--model-path", demo_model_path()]
    raw = parser.parse_args(argv)
    raw._radix_eviction_policy_explicitly_set = any(arg.split("=")[0] == "--radix-eviction-policy" for arg in argv)
    logging.basicConfig(
        level=getattr(logging, raw.log_level.upper()),
        format="[%(asctime)s] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        force=True,
    )
    server_args = ShiftServerArgs.from_cli_args(raw)
    from sglang.srt.sampling.watermarking.core import redact_watermark_command_line

    server_args._launch_command = redact_watermark_command_line(argv, raw.watermark_config)
    return server_args


def names_model(argv: list[str]) -> bool:
    """Whether a command line says which model to serve, or only asks for help."""
    return any(
        arg.split("=")[0] in ("--model-path", "--model", "-h", "--help") or (i == 0 and not arg.startswith("-"))
        for i, arg in enumerate(argv)
    )
