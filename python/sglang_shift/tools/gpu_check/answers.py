"""Reads the answers of a server, and compares the answers of two servers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from sglang_shift.observe.events import META_INFO_KEY

NEW_TOKENS = 16
ALTERNATIVES = 5
"""Number of alternatives that a server reports for each token."""

LONGEST_PROMPT = 700
"""Tokens of the longest prompt. It takes more than one chunk."""


@dataclass(frozen=True)
class Answer:
    """One finished request.

    Attributes:
        tokens: The tokens that the server generated greedily.
        logprobs: The logprob of each generated token.
        alternatives: The likeliest tokens at the place of each generated token, with their logprobs.
        prompt_logprobs: The logprobs of the prompt's tokens, if the request asked for them.
        steps: Number of steps that computed tokens of the request, by mode. Stock SGLang does not say it.
    """

    tokens: list[int]
    logprobs: list[float]
    alternatives: list[dict[int, float]]
    prompt_logprobs: list[float]
    steps: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, body: dict[str, Any]) -> Answer:
        """Read one answer of ``/generate``."""
        meta = body["meta_info"]
        return cls(
            body["output_ids"],
            [entry[0] for entry in meta["output_token_logprobs"]],
            [{entry[1]: entry[0] for entry in place} for place in meta["output_top_logprobs"]],
            [entry[0] for entry in meta.get("input_token_logprobs") or () if entry[0] is not None],
            meta.get(META_INFO_KEY, {}),
        )


@dataclass
class Difference:
    """The differences between answers and a reference.

    Attributes:
        compared: Number of tokens that were compared.
        ties: Number of answers that leave the reference at two tokens that are almost equally likely in the
            reference. The tokens after this place are not compared.
        worst: The largest difference between two logprobs.
        problems: Differences that rounding does not explain.
    """

    compared: int = 0
    ties: int = 0
    worst: float = 0.0
    problems: list[str] = field(default_factory=list)


def make_prompts(vocabulary: int, count: int = 12) -> list[list[int]]:
    """Make prompts of random tokens. Their lengths grow geometrically from 1 to :data:`LONGEST_PROMPT`."""
    chance = random.Random(0)
    lengths = [round(LONGEST_PROMPT ** (i / (count - 1))) for i in range(count)]
    return [[chance.randrange(vocabulary) for _ in range(length)] for length in lengths]


def requests(prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Make two bodies for ``/generate`` with all prompts. The second body asks for logprobs of the prompts as well."""
    body = {
        "input_ids": prompts,
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": ALTERNATIVES,
    }
    return [body, body | {"logprob_start_len": 0}]


def compare(ours: list[Answer], reference: list[Answer], tolerance: float) -> Difference:
    """Compare greedy tokens and logprobs with a reference.

    Args:
        ours: The answers to check.
        reference: The answers of the reference to the same requests.
        tolerance: The largest difference between two logprobs that rounding explains. Two tokens count as equally
            likely if their logprobs differ by at most the tolerance.
    """
    difference = Difference()
    for i, (answer, expected) in enumerate(zip(ours, reference, strict=True)):
        _compare_prompt(difference, i, answer, expected, tolerance)
        for place, (token, expected_token) in enumerate(zip(answer.tokens, expected.tokens, strict=True)):
            if token != expected_token:
                gap = expected.logprobs[place] - expected.alternatives[place].get(token, float("-inf"))
                if gap <= tolerance:
                    difference.ties += 1
                else:
                    difference.problems.append(f"answer {i}, token {place}: {token} instead of {expected_token}")
                break
            difference.compared += 1
            where = f"answer {i}, token {place}"
            _compare_logprob(difference, where, answer.logprobs[place], expected.logprobs[place], tolerance)
    return difference


def _compare_prompt(difference: Difference, i: int, answer: Answer, expected: Answer, tolerance: float) -> None:
    lengths = [len(a.prompt_logprobs) for a in (answer, expected)]
    if lengths[0] != lengths[1]:
        difference.problems.append(f"answer {i} has {lengths[0]} prompt logprobs, not {lengths[1]}")
        return
    for place, pair in enumerate(zip(answer.prompt_logprobs, expected.prompt_logprobs, strict=True)):
        _compare_logprob(difference, f"prompt {i}, token {place + 1}", *pair, tolerance)


def _compare_logprob(difference: Difference, where: str, logprob: float, expected: float, tolerance: float) -> None:
    error = abs(logprob - expected)
    difference.worst = max(difference.worst, error)
    if not error <= tolerance:  # this is true for NaN, too
        difference.problems.append(f"{where}: a logprob of {logprob:.4f} instead of {expected:.4f}")
