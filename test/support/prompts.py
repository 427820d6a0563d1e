"""Makes prompts of every length from text that every machine has, and compares answers."""

from __future__ import annotations

import argparse
import inspect

from harness import Answer
from sglang_shift.models.demo import demo_model_path
from transformers import AutoTokenizer

LOGPROB_TOLERANCE = 1e-4


def text_ids() -> list[int]:
    """Return the token ids of a standard library module. They suffice for prompts of 2,000 tokens at many offsets."""
    return AutoTokenizer.from_pretrained(demo_model_path()).encode(inspect.getsource(argparse))


def prompts(count: int = 64, longest: int = 2000) -> list[list[int]]:
    """Return ``count`` different prompts, whose lengths grow geometrically from 1 to ``longest``."""
    ids = text_ids()
    lengths = [round(longest ** (i / (count - 1))) for i in range(count)]
    return [ids[(start := (i * 397) % (len(ids) - longest)) : start + n] for i, n in enumerate(lengths)]


def assert_same_answers(ours: list[Answer], reference: list[Answer], tolerance: float = LOGPROB_TOLERANCE) -> None:
    """Assert that the greedy tokens are the same, and that their logprobs are within ``tolerance``."""
    assert len(ours) == len(reference)
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert a.tokens == b.tokens, f"prompt {i}: {a.tokens} instead of {b.tokens}"
        worst = max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True))
        assert worst <= tolerance, f"prompt {i}: a logprob differs by {worst}"
