"""Reads the answers of a server, and compares the answers of two servers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

NEW_TOKENS = 16
TOP = 5
"""Number of alternatives that a server reports for each token."""

LONGEST = 700
"""Tokens of the longest prompt. It takes more than one chunk."""


@dataclass(frozen=True)
class Answer:
    """One finished request.

    Attributes:
        tokens: The tokens that the server generated greedily.
        logprobs: The logprob of each generated token.
        alternatives: The likeliest tokens at the place of each generated token, with their logprobs.
        prompt_logprobs: The logprobs of the prompt's tokens, if the request asked for them.
    """

    tokens: list[int]
    logprobs: list[float]
    alternatives: list[dict[int, float]]
    prompt_logprobs: list[float]

    @classmethod
    def of(cls, body: dict[str, Any]) -> Answer:
        """Read one answer of ``/generate``."""
        meta = body["meta_info"]
        return cls(
            body["output_ids"],
            [entry[0] for entry in meta["output_token_logprobs"]],
            [{entry[1]: entry[0] for entry in place} for place in meta["output_top_logprobs"]],
            [entry[0] for entry in meta.get("input_token_logprobs") or () if entry[0] is not None],
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


def prompts(vocabulary: int, count: int = 12) -> list[list[int]]:
    """Make prompts of random tokens. Their lengths grow geometrically from 1 to :data:`LONGEST`."""
    chance = random.Random(0)
    lengths = [round(LONGEST ** (i / (count - 1))) for i in range(count)]
    return [[chance.randrange(vocabulary) for _ in range(length)] for length in lengths]


def requests(asked: list[list[int]]) -> list[dict[str, Any]]:
    """Make two bodies for ``/generate`` with all prompts. The second body asks for logprobs of the prompts as well."""
    body = {
        "input_ids": asked,
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": TOP,
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
    result = Difference()
    for i, (mine, theirs) in enumerate(zip(ours, reference, strict=True)):
        _compare_prompt(result, i, mine, theirs, tolerance)
        for place, (token, expected) in enumerate(zip(mine.tokens, theirs.tokens, strict=True)):
            if token != expected:
                gap = theirs.logprobs[place] - theirs.alternatives[place].get(token, float("-inf"))
                if gap <= tolerance:
                    result.ties += 1
                else:
                    result.problems.append(f"answer {i}, token {place}: {token} instead of {expected}")
                break
            result.compared += 1
            where = f"answer {i}, token {place}"
            _compare_logprob(result, where, mine.logprobs[place], theirs.logprobs[place], tolerance)
    return result


def _compare_prompt(result: Difference, i: int, mine: Answer, theirs: Answer, tolerance: float) -> None:
    lengths = [len(answer.prompt_logprobs) for answer in (mine, theirs)]
    if lengths[0] != lengths[1]:
        result.problems.append(f"answer {i} has {lengths[0]} prompt logprobs, not {lengths[1]}")
        return
    for place, pair in enumerate(zip(mine.prompt_logprobs, theirs.prompt_logprobs, strict=True)):
        _compare_logprob(result, f"prompt {i}, token {place + 1}", *pair, tolerance)


def _compare_logprob(result: Difference, where: str, mine: float, theirs: float, tolerance: float) -> None:
    difference = abs(mine - theirs)
    result.worst = max(result.worst, difference)
    if not difference <= tolerance:  # this is true for NaN, too
        result.problems.append(f"{where}: a logprob of {mine:.4f} instead of {theirs:.4f}")
