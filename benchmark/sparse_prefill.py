#!/usr/bin/env python3
"""Measure what sparse prefills lose and save, on a real model: SmolLM2-135M-Instruct, in float32 on a CPU.

    ./scripts/chat_model.sh                        # once: installs the weights
    python benchmark/sparse_prefill.py
    python benchmark/sparse_prefill.py --lengths 7680 --bounds 0.05

The text is this repository's documents, with three numbers hidden in it, at 10, 40 and 70 % of its length. The last
chunk ends with a question for one of them. Chunks are computed as a server with ``--shift-sparse-prefill EPS``
computes them, by the same code, but from the second chunk on. All chunks of a text are sparse, and each run continues
its own KV cache, so errors add up as in a server. Each row compares with exact attention on the same text:

- the share of pairs of a query and a key whose value was used, of all pairs in sparse chunks;
- the dropped masses: mean, p99 and maximum;
- over the tokens of the last chunk before the question: how often the likeliest next token is the same, and the
  KL divergence from the exact distribution;
- the loss of the answer's tokens in nats, and how many of the three numbers are answered;
- the CPU time of all attention.

``--rule mean`` bounds the mean of the dropped masses of the queries that choose together, in place of the maximum.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "test/support"))

CHUNK = 512
TEXTS = ("usage.md", "decisions.md", "concepts.md", "models.md")
NUMBERS = {
    "secret number of the blue house": "48213", "code of the old library": "73906", "price of the red boat": "15587",
}  # fmt: skip
PLACES = (0.1, 0.4, 0.7)
HIDDEN = "\n\nRemember this: the {name} is {number}.\n\n"
QUESTION = "\n\nQuestion: what is the {name}?\nAnswer: the {name} is"
HEADER = (
    "| Tokens | Bound on | EPS | Pairs computed | Dropped mass, mean | p99 | max | Same next token | KL "
    "| Loss of the numbers | Numbers found | Attention, s |"
)


@dataclass
class Prompt:
    """A text with hidden numbers, and its last chunk for each question.

    Attributes:
        text: Tokens of all chunks but the last.
        ends: Tokens of the last chunk with its answer, one for each number.
        answers: The number of tokens of each answer.
        common: Tokens of the last chunk before its question.
    """

    text: list[int]
    ends: list[list[int]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    common: int = 0


def prompt_of(tokenizer: Any, length: int) -> Prompt:
    """Hide the numbers in a text. The text and any question have ``length`` tokens, a multiple of the chunk."""
    words = tokenizer.encode("".join((ROOT / "docs" / name).read_text() for name in TEXTS))
    hidden = [tokenizer.encode(HIDDEN.format(name=name, number=n)) for name, n in NUMBERS.items()]
    questions = [tokenizer.encode(QUESTION.format(name=name)) for name in NUMBERS]
    answers = [tokenizer.encode(" " + number) for number in NUMBERS.values()]
    body = length - max(map(len, questions)) - sum(map(len, hidden))
    assert len(words) >= body, f"the documents have {len(words)} tokens"
    cuts = [0, *(int(place * body) for place in PLACES), body]
    ids: list[int] = []
    for (begin, end), needle in zip(pairwise(cuts), [*hidden, []], strict=True):
        ids += words[begin:end] + needle
    start = length - CHUNK
    ends = [ids[start:] + question + answer for question, answer in zip(questions, answers, strict=True)]
    return Prompt(ids[:start], ends, list(map(len, answers)), len(ids) - start)


class Attention:
    """Attention for transformers' classes: exact, or sparse with a bound."""

    def __init__(self) -> None:
        from sglang_shift.platforms.sparse_attention import DroppedMass

        self.bound: float | None = None
        self.record = DroppedMass()
        self.seconds = 0.0  # of CPU time

    def __call__(self, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        from sglang_shift.platforms.attention import attend
        from sglang_shift.platforms.sparse_attention import attend_sparsely

        begin = time.process_time()
        query, key, value = (x[0].transpose(0, 1) for x in (q, k, v))
        if self.bound is None or key.shape[0] == query.shape[0]:
            part = attend(query, key, value, scale=scaling)
        else:
            part = attend_sparsely(query, key, value, scale=scaling, bound=self.bound, record=self.record)
        self.seconds += time.process_time() - begin
        return part.output.unsqueeze(0), None


@dataclass
class Run:
    """What the model answers after a text.

    Attributes:
        logprobs: ``[tokens, vocabulary]``, of the tokens of the last chunk before the question.
        losses: The mean loss of each number's tokens.
        found: Whether each of a number's tokens is the likeliest.
    """

    logprobs: torch.Tensor
    losses: list[float]
    found: list[bool]


@torch.no_grad()
def run(model: Any, prompt: Prompt) -> Run:
    """Compute the text chunk by chunk, and then the last chunk for each question."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for start in range(0, len(prompt.text), CHUNK):
        model.model(torch.tensor([prompt.text[start : start + CHUNK]]), past_key_values=cache, use_cache=True)
    losses, found = [], []
    common = torch.empty(0)
    for end, count in zip(prompt.ends, prompt.answers, strict=True):
        # The answer's tokens are in the last chunk, too. Each attends to all before it, as if it were decoded.
        hidden = model.model(torch.tensor([end]), past_key_values=cache, use_cache=True).last_hidden_state[0]
        if not losses:
            common = model.lm_head(hidden[: prompt.common]).log_softmax(-1)
        last = model.lm_head(hidden[-count - 1 : -1]).log_softmax(-1)
        answer = torch.tensor(end[-count:])
        losses.append(-float(last.gather(1, answer[:, None]).mean()))
        found.append(bool((last.argmax(-1) == answer).all()))
        cache.crop(-len(end))
    return Run(common, losses, found)


def rows(model: Any, attention: Attention, prompt: Prompt, rule: str, bounds: list[float]) -> Iterator[str]:
    """The rows of a table for one text: exact attention, then each bound."""
    from sglang_shift.platforms.sparse_attention import DroppedMass

    length, attention.bound, attention.seconds = len(prompt.text) + CHUNK, None, 0.0
    exact = run(model, prompt)
    seconds = f"{attention.seconds:.1f}"
    yield f"| {length} | exact | | 100 % | | | | | | {_mean(exact.losses):.3f} | {_found(exact)} | {seconds} |"
    for bound in bounds:
        attention.bound, attention.record, attention.seconds = bound, DroppedMass(), 0.0
        sparse, dropped = run(model, prompt), attention.record
        same = (sparse.logprobs.argmax(-1) == exact.logprobs.argmax(-1)).double().mean()
        divergence = (exact.logprobs.exp() * (exact.logprobs - sparse.logprobs)).sum(-1).mean()
        yield (
            f"| {length} | {rule} | {bound:g} | {100 * dropped.computed_share:.1f} % | {dropped.mean:.5f} "
            f"| {dropped.p99:.4f} | {dropped.largest:.4f} | {100 * same:.1f} % | {divergence:.5f} "
            f"| {_mean(sparse.losses):.3f} | {_found(sparse)} | {attention.seconds:.1f} |"
        )


def _mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def _found(run: Run) -> str:
    return f"{sum(run.found)} of {len(run.found)}"


def bound_the_mean() -> None:
    """Let blocks be left out until the mean dropped mass reaches the bound, in place of the largest one."""
    from sglang_shift.platforms import sparse_attention

    def choose(shares: torch.Tensor, bound: float) -> tuple[torch.Tensor, torch.Tensor]:
        order = shares.mean(0).argsort()
        dropped = shares[:, order].cumsum(1)
        count = int((dropped.mean(0) <= bound).sum())
        computed = torch.ones(shares.shape[1], dtype=torch.bool)
        computed[order[:count]] = False
        return computed, dropped[:, count - 1] if count else torch.zeros_like(shares[:, 0])

    sparse_attention.choose_blocks = choose


def numbers(kind: type) -> Any:
    """A parser for numbers with commas between them."""
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    """Print a table."""
    import smollm2

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=numbers(int), default=[1024, 2048, 4096], help=f"multiples of {CHUNK}")
    parser.add_argument("--bounds", type=numbers(float), default=[0.01, 0.05, 0.2])
    parser.add_argument("--rule", choices=("max", "mean"), default="max", help="of which masses the bound is")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if any(length % CHUNK or length < 2 * CHUNK for length in options.lengths):
        parser.error(f"--lengths must be multiples of {CHUNK}, and at least {2 * CHUNK}")
    torch.set_num_threads(options.threads)
    if options.rule == "mean":
        bound_the_mean()
    attention = Attention()
    model, tokenizer = smollm2.load(attention)
    print(HEADER, "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|", sep="\n", flush=True)
    begin = time.process_time()
    for length in options.lengths:
        for row in rows(model, attention, prompt_of(tokenizer, length), options.rule, options.bounds):
            print(row, flush=True)
    print(f"\n{time.process_time() - begin:.0f} s of CPU time", file=sys.stderr)


if __name__ == "__main__":
    main()
