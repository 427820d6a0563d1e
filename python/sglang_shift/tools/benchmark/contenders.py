"""Whom the benchmark compares: how each server is started, or where it already runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_shift.errors import ShiftError
from sglang_shift.flags import POLICIES

BASELINE = "stock-tp"
DEFAULT = (BASELINE, "stock-dp", "sp", "shift")


@dataclass(frozen=True)
class Contender:
    """A server to measure.

    Attributes:
        name: How reports call it.
        flags: Flags of ``sglang_shift.launch_server`` that make it; without ours, that is stock SGLang.
        url: Where it already runs, instead.
        ranks: Ranks that communicate with each other: what a link is for.
    """

    name: str
    flags: tuple[str, ...] = ()
    url: str | None = None
    ranks: int = 1


def contender(text: str, ranks: int, sp_size: int | None = None, kv_tokens: int | None = None) -> Contender:
    """The contender that a user's word names.

    Args:
        text: ``stock-tp``, ``stock-dp``, ``tp``, ``sp``, ``shift``, ``shift:POLICY`` or ``NAME=URL``.
        ranks: P.
        sp_size: S of ``sp`` and ``shift``; P if left out.
        kv_tokens: Tokens that the KV pools of a contender hold in all. A rank of TP or SP holds 1/P of the heads of
            each token and a replica holds all of them, so replicas get ``kv_tokens / P`` each: the same bytes.

    Raises:
        ShiftError: it names none.
    """
    name, equals, url = text.partition("=")
    if equals:
        if not name or not url.startswith(("http://", "https://")):
            raise ShiftError(f"contender {text!r} is not NAME=URL with a URL of http or https")
        return Contender(name, url=url.rstrip("/"))
    size = ["--tp-size", str(ranks)]
    base = ["--sp-size", str(ranks if sp_size is None else sp_size)]
    kinds = {
        BASELINE: size,
        "stock-dp": ["--tp-size", "1", "--dp-size", str(ranks)],
        "tp": [*size, *base, "--enable-shift-parallel", "--shift-policy", "tp"],
        "sp": [*size, *base],
        "shift": [*size, *base, "--enable-shift-parallel"],
    }
    kind, _, policy = text.partition(":")
    if kind not in kinds or (policy and kind != "shift"):
        raise ShiftError(f"contender {text!r} is none of {', '.join(kinds)}, shift:POLICY or NAME=URL")
    if policy and policy not in POLICIES and ":" not in policy:
        raise ShiftError(f"contender {text!r}: the policy is none of {', '.join(POLICIES)} or module:Class")
    flags = kinds[kind] + (["--shift-policy", policy] if policy else [])
    replicas = ranks if kind == "stock-dp" else 1
    if kv_tokens is not None:
        flags += ["--max-total-tokens", str(kv_tokens // replicas)]
    return Contender(text, tuple(flags), ranks=ranks // replicas)


def contenders(
    texts: Sequence[str], ranks: int, sp_size: int | None = None, kv_tokens: int | None = None
) -> list[Contender]:
    """All that the user names, as :func:`contender`.

    Raises:
        ShiftError: a word names none, or two have one name.
    """
    made = [contender(text, ranks, sp_size, kv_tokens) for text in texts]
    names = [c.name for c in made]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ShiftError(f"contender {twice[0]!r} is named twice")
    return made
