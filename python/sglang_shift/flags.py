"""Defines our flags. Each flag stands once, in one table, and all other code reads this table.

``python -m sglang_shift.args flags`` prints ``docs/flags.md`` from the table. This module does not import SGLang,
because every ``sglang serve`` reads the table to see whether the command line has one of our flags.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from types import UnionType
from typing import Any

from sglang_shift.config import ShiftConfig
from sglang_shift.modes import MODES

AUTO = "auto"
POLICIES = ("calibrated", "queue-depth", "tokens", *(mode.value for mode in MODES))
"""The policies that come with the package. SGLang's numeric interface identifies a policy by its index here."""
EXCHANGES = (AUTO, "flashinfer", "collective")
EXCHANGE_DTYPES = (AUTO, "fp8")
"""The data that an exchange sends: unchanged activations, or quantized activations."""

EXCHANGE_PIPELINES = (AUTO, "on", "off")
CHECKS = ("on", "off")
INSTANCE_POLICIES = ("fixed", AUTO, "paper")
MERGE_WEIGHTS = ("keep", "free")
EXPERTS = ("sharded", "replicated")


class Need(StrEnum):
    """The flags that another flag needs to have an effect."""

    NOTHING = ""
    SP = "--sp-size or --enable-shift-parallel"
    SWITCHING = "--enable-shift-parallel"
    INSTANCES = "--instances"


@dataclass(frozen=True)
class Flag:
    """One flag. It is a field of the server arguments, and its value must be equal on all ranks.

    Attributes:
        name: The field of the server arguments.
        setting: The field of :class:`sglang_shift.config.ShiftConfig`.
        type: The Python type of the value; ``bool`` is a flag without a value.
        meaning: Plain text for ``--help`` and the page of flags.
        default: The value if the user does not give the flag, in words; empty for off.
        placeholder: A word that stands for the value on the page of flags.
        need: The flags that this flag needs. Without them it is refused.
        without: The reason for such a refusal, if the flag is a setting of SP mode.
        policies: The policies that use the flag; empty if it is not a setting of a policy.
        live: Whether ``/set_internal_state`` can change the value.
        aliases: Other names on the command line.
        choices: All possible values; empty if there are too many to list.
        parse: Reads the value from a command line, if ``type`` does not.
        resolvable: Whether our resolution may replace the value.
        more: The place in the documents that says more, relative to ``docs/``.
    """

    name: str
    setting: str
    type: type | UnionType
    meaning: str
    default: str = ""
    placeholder: str = "N"
    need: Need = Need.NOTHING
    without: str = ""
    policies: tuple[str, ...] = ()
    live: bool = False
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    resolvable: bool = False
    more: str = ""

    @property
    def option(self) -> str:
        """The name of the flag on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def options(self) -> tuple[str, ...]:
        """All names of the flag on the command line."""
        return (self.option, *self.aliases)

    @property
    def help(self) -> str:
        """The text for ``--help``."""
        parts = [self.meaning, self.limits]
        if self.need:
            parts.append(f"It needs {self.need}.")
        if self.default:
            parts.append(f"Default: {self.default}.")
        return " ".join(filter(None, parts))

    @property
    def limits(self) -> str:
        """One sentence that names the policies of the flag; empty if it is not a setting of a policy."""
        if not self.policies:
            return ""
        return f"It is only for the {'policies' if len(self.policies) > 1 else 'policy'} {' and '.join(self.policies)}."


def parse_ranks(text: str) -> int | str:
    """Parse the value of ``--sp-size`` or ``--dcp-size`` from a command line or a ``--config`` file.

    Raises:
        argparse.ArgumentTypeError: the value is neither a whole number nor ``auto``.
    """
    if text.strip() == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a whole number of ranks nor '{AUTO}'") from None


def _queue_flag(setting: str, meaning: str) -> Flag:
    return Flag(
        "shift_" + setting,
        setting,
        int,
        meaning,
        default=str(getattr(ShiftConfig, setting)),
        need=Need.SWITCHING,
        policies=("queue-depth",),
        live=True,
    )


FLAGS = (
    Flag(
        "sp_size",
        "sp_size",
        int | str,
        "Ulysses sequence parallelism (SP) over S ranks. S divides --tp-size P. With auto, S is the largest one whose "
        "weights fit beside the KV pool. The base configuration is SP = S, TP = P/S. Without --enable-shift-parallel, "
        "every step runs in the base configuration.",
        default="auto with --enable-shift-parallel (on a CPU: P), else none",
        placeholder="S",
        aliases=("--sequence-parallel-size",),
        parse=parse_ranks,
        resolvable=True,
        more="usage.md#choose-p-and-s",
    ),
    Flag(
        "enable_shift_parallel",
        "switching",
        bool,
        "Shift Parallelism: each step runs in full tensor parallelism (TP) over P ranks or in the base configuration, "
        "as --shift-policy decides.",
    ),
    Flag(
        "shift_policy",
        "policy",
        str,
        f"How the mode of a step is chosen: {', '.join(POLICIES)}, or a class of your own as module:Class. calibrated "
        "takes the faster mode by step times that are measured at start-up. queue-depth takes SP for many tokens, and "
        "for prefills while the queue is deep. tokens takes SP if the step has more tokens than --shift-threshold. tp "
        "and sp take that mode for every step.",
        default="calibrated",
        placeholder="NAME",
        need=Need.SWITCHING,
        live=True,
        resolvable=True,
        more="usage.md#the-mode-selector",
    ),
    Flag(
        "shift_threshold",
        "threshold",
        int,
        "A step with more tokens than this runs in SP. Given without --shift-policy, this flag selects the policy "
        "tokens.",
        default=str(ShiftConfig.threshold),
        need=Need.SWITCHING,
        policies=("tokens", "queue-depth"),
        live=True,
        resolvable=True,
    ),
    _queue_flag("enter_requests", "The queue is deep if at least this many requests wait."),
    _queue_flag("leave_requests", "The queue can be short again only if fewer requests than this wait."),
    _queue_flag("enter_tokens", "The queue is deep if at least this many prompt tokens are pending."),
    _queue_flag("leave_tokens", "The queue can be short again only if fewer prompt tokens than this are pending."),
    Flag(
        "shift_tbt_target",
        "tbt_target",
        float,
        "A bound on the gap between two tokens of a request, in milliseconds (TBT is the time between tokens). While "
        "requests decode, each step takes as many prompt tokens as fit the bound by measured step times, but at least "
        "512 of them. Prompts and decodes share steps if SGLang can mix them, and take turns if not. 0 is no bound.",
        placeholder="MS",
        need=Need.SWITCHING,
        live=True,
        more="long-prompts.md",
    ),
    Flag(
        "shift_calibration",
        "calibration",
        str,
        "Where the step times come from. auto: saved ones for this model, hardware and versions; if there are none, "
        "they are measured and saved. off: there are none, and the default policy is tokens. FILE: that file; if it "
        "does not exist, the times are measured and written to it.",
        default="auto",
        placeholder="{auto,off,FILE}",
        need=Need.SWITCHING,
        policies=("calibrated",),
        resolvable=True,
        more="usage.md#calibration",
    ),
    Flag(
        "shift_exchange",
        "exchange",
        str,
        "What exchanges the sequence around attention in SP. flashinfer: FlashInfer's Ulysses communicator (an NVLink "
        "kernel, or NCCL), on the GPUs of one node, for S = 2, 4, 6 or 8. collective: an all-to-all with a copy before "
        "or after it, anywhere. auto: flashinfer if it has NVLink between all ranks of an SP group, else collective.",
        default="auto",
        need=Need.SP,
        without="nothing is exchanged",
        choices=EXCHANGES,
        more="usage.md#the-exchange",
    ),
    Flag(
        "shift_exchange_dtype",
        "exchange_dtype",
        str,
        "What that exchange sends. auto: activations as they are. fp8: activations rounded to e4m3 (3 bits of "
        "mantissa), with a scale for each row, which is about half of the bytes of bfloat16. The exchange is then "
        "collective.",
        default="auto",
        need=Need.SP,
        without="nothing is exchanged",
        choices=EXCHANGE_DTYPES,
        more="usage.md#the-exchange",
    ),
    Flag(
        "shift_exchange_pipeline",
        "exchange_pipeline",
        str,
        "Whether the heads of a layer are exchanged group by group, so that messages overlap with attention. auto: "
        "prefills for which the calibration finds it faster. on: all prefills in SP. off: none. It has never run on a "
        "GPU.",
        default="off",
        need=Need.SP,
        without="nothing is exchanged",
        choices=EXCHANGE_PIPELINES,
        resolvable=True,
        more="usage.md#the-exchange-by-groups-of-heads",
    ),
    Flag(
        "shift_experts",
        "experts",
        str,
        "How ranks share routed experts in SP. sharded: as in TP, so the ranks gather the tokens of a layer and sum "
        "its outputs. replicated: each rank also has the parts of the other ranks of its SP group, so they send "
        "nothing, and the experts take S times the memory.",
        default="sharded",
        need=Need.SP,
        without="experts are sharded",
        choices=EXPERTS,
        more="usage.md#experts",
    ),
    Flag(
        "shift_sparse_prefill",
        "sparse_prefill",
        float,
        "Chunks of long prompts may leave out blocks of their prefix. In each layer, what a query leaves out has at "
        "most EPS of its softmax mass. Answers differ from exact ones. This is for CPUs only. 0 leaves out nothing.",
        placeholder="EPS",
        need=Need.SP,
        without="stock SGLang computes prompts",
        more="long-prompts.md#sparse-prefill",
    ),
    Flag(
        "shift_check",
        "check",
        str,
        "Whether the server compares the modes when it starts. on: made-up requests run in each mode, and the server "
        "refuses to start if their logits are farther apart than rounding explains. off: nothing is compared.",
        default="on",
        need=Need.SP,
        without="there is one mode, and nothing to compare it with",
        choices=CHECKS,
        more="usage.md#the-check-at-start-up",
    ),
    Flag(
        "shift_graph_buckets",
        "graph_buckets",
        int,
        "CUDA graphs are captured in SP for at most this many batch sizes, and for at most as many sizes of prefills. "
        "If SGLang has more sizes, they are thinned out from the largest down. With 0, SP steps run eagerly, which is "
        "slow for small ones on a GPU.",
        default="all sizes that the policy may run in SP",
        need=Need.SP,
        without="no step is in SP",
        more="usage.md#cuda-graphs",
    ),
    Flag(
        "instances",
        "instances",
        int,
        "The number of instances that the server starts with. Each has P/N ranks and serves requests of its own. "
        "Neighbours can merge into a larger instance, and split again, while they serve. P and N are powers of two. "
        "Without --enable-shift-parallel, all steps run in TP, or with --sp-size S in SP.",
        more="instances.md#start-a-server",
    ),
    Flag(
        "merge_levels",
        "merge_levels",
        str,
        "The numbers of ranks that merged instances may have, with commas between them. P is always one of them. Each "
        "number takes memory for its process groups.",
        default="all powers of two above P/N",
        placeholder="K,...",
        need=Need.INSTANCES,
        more="instances.md#levels",
    ),
    Flag(
        "instance_policy",
        "instance_policy",
        str,
        "Who decides when instances merge and split. fixed: only an operator does. paper: the rules of the paper Gyges "
        "do, too. They merge instances for a request that fits none of them, and split an instance when its requests "
        "fit its parts and half of its KV cache is free. auto: predictions from the step times of each level do. It "
        "takes the layout that should serve the requests of the last minutes best.",
        default="fixed",
        need=Need.INSTANCES,
        choices=INSTANCE_POLICIES,
        more="instances.md#when-to-merge-and-to-split",
    ),
    Flag(
        "merge_weights",
        "merge_weights",
        str,
        "What a rank of a merged instance does with the FFN weights that TP does not need. keep: they stay, so steps "
        "can run in TP or in SP. free: their memory goes to the KV cache until the instance splits, and all steps of "
        "the merged instance run in TP.",
        default="keep",
        need=Need.INSTANCES,
        choices=MERGE_WEIGHTS,
        more="instances.md#two-kinds-of-merges",
    ),
)

BY_NAME = {flag.name: flag for flag in FLAGS}
LIVE_NUMBERS = tuple(flag for flag in FLAGS if flag.live and flag.type is int)
"""The flags of the policies that take a number: tokens or requests, 0 or more."""
