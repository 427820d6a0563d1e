"""Defines the servers that the benchmark compares: how each server is started, or where it already runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_shift.errors import ShiftError
from sglang_shift.flags import INSTANCE_POLICIES, POLICIES

BASELINE = "stock-tp"
DEFAULT = (BASELINE, "stock-dp", "sp", "shift")
NUMBERED = {"sarathi": "TOKENS", "tbt": "MS"}
"""The contenders that need a number: the size of a chunk of a prompt, and a target for the time between tokens."""
INSTANCES = "instances"
DP_CONTROLLER = "sglang::data_parallel_controller"
"""The title of the process that sends requests to the replicas of stock SGLang. Its loop never waits."""


@dataclass(frozen=True)
class Contender:
    """A server to measure.

    Attributes:
        name: The name of the server in reports.
        flags: Its flags for ``sglang_shift.launch_server``. Without a flag of ours, the server is stock SGLang.
        url: The address of a server that already runs. Such a server needs no flags.
        ranks: Number of ranks that communicate with each other. An emulated link joins these ranks.
        levels: The levels to which instances can merge, the lowest first; empty if the server has no instances.
        busy_loop: The title of a process that uses a whole core even if it has nothing to do; None if there is none.
    """

    name: str
    flags: tuple[str, ...] = ()
    url: str | None = None
    ranks: int = 1
    levels: tuple[int, ...] = ()
    busy_loop: str | None = None


def parse_contender(text: str, ranks: int, sp_size: int | None = None, kv_tokens: int | None = None) -> Contender:
    """Return the contender that a user's word names.

    Args:
        text: ``stock-tp``, ``stock-dp``, ``sarathi:TOKENS``, ``tp``, ``sp``, ``shift``, ``shift:POLICY``, ``tbt:MS``,
            ``instances:N``, ``instances:N:POLICY`` or ``NAME=URL``.
        ranks: P.
        sp_size: S of ``sp`` and ``shift``. None means P.
        kv_tokens: Number of tokens that all KV pools of a contender hold together. A rank of TP or SP holds 1/P of the
            heads of each token, and a replica holds all heads. So each replica gets ``kv_tokens / P`` tokens, which
            take the same bytes. Instances divide the tokens themselves.

    Raises:
        ShiftError: the word names no contender.
    """
    name, equals, url = text.partition("=")
    if equals:
        if not name or not url.startswith(("http://", "https://")):
            raise ShiftError(f"contender {text!r} is not NAME=URL with a URL of http or https")
        return Contender(name, url=url.rstrip("/"))
    if text.partition(":")[0] == INSTANCES:
        return _instances(text, ranks, kv_tokens)
    size = ["--tp-size", str(ranks)]
    base = ["--sp-size", str(ranks if sp_size is None else sp_size)]
    kinds = {
        BASELINE: size,
        "sarathi": [*size, "--enable-mixed-chunk", "--chunked-prefill-size"],
        "stock-dp": ["--tp-size", "1", "--dp-size", str(ranks)],
        "tp": [*size, *base, "--enable-shift-parallel", "--shift-policy", "tp"],
        "sp": [*size, *base],
        "shift": [*size, *base, "--enable-shift-parallel"],
        "tbt": [*size, *base, "--enable-shift-parallel", "--shift-tbt-target"],
    }
    kind, _, value = text.partition(":")
    if kind not in kinds or (value and kind not in ("shift", *NUMBERED)):
        names = [f"{name}:{NUMBERED[name]}" if name in NUMBERED else name for name in kinds]
        raise ShiftError(
            f"contender {text!r} is none of {', '.join(names)}, shift:POLICY, {INSTANCES}:N, {INSTANCES}:N:POLICY or "
            "NAME=URL"
        )
    if kind in NUMBERED and not (value.isdecimal() and int(value)):
        raise ShiftError(f"contender {text!r} is not {kind}:{NUMBERED[kind]} with a whole number above 0")
    if kind == "shift" and value and value not in POLICIES and ":" not in value:
        raise ShiftError(f"contender {text!r}: the policy is none of {', '.join(POLICIES)} or module:Class")
    flags = kinds[kind] + ["--shift-policy"] * (kind == "shift" and bool(value)) + [value] * bool(value)
    replicas = ranks if kind == "stock-dp" else 1
    if kv_tokens is not None:
        flags += ["--max-total-tokens", str(kv_tokens // replicas)]
    busy_loop = DP_CONTROLLER if replicas > 1 else None
    return Contender(text, tuple(flags), ranks=ranks // replicas, busy_loop=busy_loop)


def _instances(text: str, ranks: int, kv_tokens: int | None) -> Contender:
    """Return the contender ``instances:N`` or ``instances:N:POLICY``: N instances of P/N ranks at the start.

    Without a policy, they neither merge nor split. Each step of an instance of several ranks runs in TP or in SP.

    Raises:
        ShiftError: N does not divide P into equal instances, or there is no such policy.
    """
    _, _, rest = text.partition(":")
    number, _, policy = rest.partition(":")
    count = int(number) if number.isdecimal() else 0
    if count < 2 or count & (count - 1) or ranks % count:
        raise ShiftError(f"contender {text!r} is not {INSTANCES}:N with a power of two that divides {ranks} ranks")
    if policy and policy not in INSTANCE_POLICIES:
        raise ShiftError(f"contender {text!r}: the policy is none of {', '.join(INSTANCE_POLICIES)}")
    flags = ["--tp-size", str(ranks), "--instances", number, "--enable-shift-parallel"]
    flags += ["--instance-policy", policy] if policy else []
    flags += ["--max-total-tokens", str(kv_tokens)] if kv_tokens is not None else []
    lowest = ranks // count
    levels = tuple(lowest * 2**i for i in range(count.bit_length()))
    return Contender(text, tuple(flags), ranks=ranks, levels=levels)


def parse_contenders(
    texts: Sequence[str], ranks: int, sp_size: int | None = None, kv_tokens: int | None = None
) -> list[Contender]:
    """Return all contenders that the user names, as :func:`parse_contender` makes them.

    Raises:
        ShiftError: a word names no contender, or two contenders have the same name.
    """
    contenders = [parse_contender(text, ranks, sp_size, kv_tokens) for text in texts]
    names = [c.name for c in contenders]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ShiftError(f"contender {duplicates[0]!r} is named twice")
    return contenders
