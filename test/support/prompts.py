"""Prompts of every length, from text that every machine has, and how answers are compared."""

from __future__ import annotations

import argparse
import inspect

from harness import Answer
from sglang_shift.models.demo import demo_model_path
from transformers import AutoTokenizer

LOGPROB_TOLERANCE = 1e-4


def text_ids() -> list[int]:
    """Token ids of a standard library module, enough for prompts of 2,000 tokens at many offsets."""
    return AutoTokenizer.from_pretrained(demo_model_path()).encode(inspect.getsource(argparse))


def prompts(count: int = 64, longest: int = 2000) -> list[list[int]]:
    """``count`` prompts whose lengths grow geometrically from 1 to ``longest``, all different."""
    ids = text_ids()
    lengths = [round(longest ** (i / (count - 1))) for i in range(count)]
    return [ids[(start := (i * 397) % (len(ids) - longest)) : start + n] for i, n in enumerate(lengths)]


def assert_same_answers(ours: list[Answer], reference: list[Answer], tolerance: float = LOGPROB_TOLERANCE) -> None:
    """The same greedy tokens, and their logprobs within ``tolerance``."""
    assert len(ours) == len(reference)
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert a.tokens == b.tokens, f"prompt {i}: {a.tokens} instead of {b.tokens}"
        worst = max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True))
        assert worst <= tolerance, f"prompt {i}: a logprob differs by {worst}"
