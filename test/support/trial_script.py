"""The steps of a trial: what each of them computes, in tokens. The ranks run them, and transformers is asked the same.

Four requests are prefilled together, with an odd number of tokens. They decode six forced tokens each. Then two of them
get another chunk of their prompt, which attends to all tokens before it. At last one request decodes alone: that step
has fewer tokens than there are ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

LENGTHS = (1, 2, 37, 131)  # tokens of the prompts
DECODES = 6
CHUNKS = {2: 5, 3: 18}  # tokens of the second chunk, by request
LAST = 3  # the request that decodes alone
FIRST_TOKEN = 3  # smaller ids may be special: padding, begin and end


@dataclass(frozen=True)
class Step:
    """One forward: the new tokens of each request, and whether SGLang runs it as a decode step."""

    tokens: dict[int, list[int]]
    decode: bool


def steps(vocabulary: int) -> list[Step]:
    """Return the steps of a trial. They are the same on every rank and in the reference."""
    generator = torch.Generator().manual_seed(3)

    def random_tokens(count: int) -> list[int]:
        return torch.randint(FIRST_TOKEN, vocabulary, (count,), generator=generator).tolist()

    prefill = Step({request: random_tokens(n) for request, n in enumerate(LENGTHS)}, decode=False)
    decodes = [
        Step({request: random_tokens(1) for request in range(len(LENGTHS))}, decode=True) for _ in range(DECODES)
    ]
    chunk = Step({request: random_tokens(n) for request, n in CHUNKS.items()}, decode=False)
    return [prefill, *decodes, chunk, Step({LAST: random_tokens(1)}, decode=True)]


# The mode of each step, in one letter, for each run. All runs of a trial use the same KV pool.
PATTERNS = {
    "tp": "ttttttttt",
    "sp": "sssssssss",
    "sp-tp": "sttttttst",
    "tp-sp": "tssssssts",
    "mixed": "ststststs",
}


def reference(vocabulary: int, logits_of: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
    """Return the logits ``[rows, vocabulary]`` that a trial should have, in float32.

    Args:
        vocabulary: Number of tokens of the model.
        logits_of: Computes the logits ``[tokens, vocabulary]`` of a whole sequence.
    """
    sequences: list[list[int]] = [[] for _ in LENGTHS]
    places = []  # the request and the position of each row
    for step in steps(vocabulary):
        for request, tokens in step.tokens.items():
            sequences[request] += tokens
            places.append((request, len(sequences[request]) - 1))
    logits = [logits_of(sequence).float() for sequence in sequences]
    return torch.stack([logits[request][position] for request, position in places])
