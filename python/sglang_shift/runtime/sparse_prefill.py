"""Which chunks of prompts may leave out blocks of their prefix (``--shift-sparse-prefill``), and what they left out.

The requests and the lengths of a batch are equal on all ranks, so all ranks run the same chunks sparsely. Each rank
measures its own heads. The ranks share these figures after the step, so they also agree on what follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from sglang_shift.observe.events import SparseFigures
from sglang_shift.platforms.sparse_attention import QUERY_BLOCK, DroppedMass, SparseStep
from sglang_shift.seams import relies_on

MIN_PREFIX = 4096
"""Chunks leave out blocks if their prefix has at least this many tokens. Before, there is little to save."""
MIN_SKIPPED = 0.05
"""A request that could leave out a smaller share of the pairs of a chunk is finished with exact chunks."""

SPARSE, EXACT = "sparse|", "exact|"
"""How the radix keys begin of requests that may leave out blocks, and of all others. So neither reads the others' KV
cache, whatever key a request brings."""

MUST_BE_EXACT: dict[str, Callable[[Req], bool]] = {
    "it asks for logprobs of its prompt": lambda req: (
        req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids)
    ),
    "it asks for hidden states": lambda req: bool(req.return_hidden_states),
    # SGLang warms the cache for n answers with a request of no output, and their prompts must find it.
    "it asks for scores only": lambda req: (
        req.is_prefill_only and (req.return_logprob or req.multi_item_delimiter_indices is not None)
    ),
    "it has images": lambda req: req.multimodal_inputs is not None,
    "it is of a session": lambda req: req.session is not None,
    "it searches with beams": lambda req: req.beam_group is not None,
}
"""Why a request must be exact, and whether it is such a request."""

Gather: TypeAlias = Callable[[Sequence[float]], list[list[float]]]


@dataclass
class SparseRequest:
    """What a request left out.

    Attributes:
        exact: Why its next chunks are exact; empty if they may leave out blocks.
        tokens: Its prompt tokens that were computed sparsely. After a retraction, they do not count again.
        dropped: What they left out, on all ranks, each time that they were computed.
    """

    exact: str = ""
    tokens: int = 0
    dropped: DroppedMass = field(default_factory=DroppedMass)
    _counted: list[tuple[int, int]] = field(default_factory=list)  # spans of tokens, which do not overlap

    def count(self, start: int, end: int) -> None:
        """Count the prompt tokens from ``start`` to ``end`` that were not counted before.

        After a retraction, a chunk may begin behind the prompt, in the tokens of the answer. Then it has none to count.
        """
        if end <= start:
            return
        apart = [span for span in self._counted if span[1] < start or end < span[0]]
        joined = [span for span in self._counted if span not in apart]
        self._counted = [*apart, (min([start, *(s for s, _ in joined)]), max([end, *(e for _, e in joined)]))]
        self.tokens = sum(e - s for s, e in self._counted)

    def figures(self) -> SparseFigures:
        """The figures for the answer."""
        dropped = self.dropped
        return SparseFigures(
            self.tokens, dropped.mean, dropped.p99, dropped.largest, dropped.computed_share, self.exact
        )


class SparsePrefill:
    """The sparse chunks of one rank. All ranks call each method at the same point.

    Args:
        bound: The dropped mass that no query exceeds; 0 if all chunks are exact.
        backend: The attention backend, with ``sparse``.
        gather: Gets the numbers of all ranks: :func:`sglang_shift.runtime.agreement.from_all_ranks`.

    Attributes:
        chunks: Chunks that were computed sparsely.
    """

    def __init__(self, bound: float, backend: Any, gather: Gather) -> None:
        self.bound, self.backend, self.gather = bound, backend, gather
        self.chunks = 0

    @relies_on("sglang.srt.mem_cache.common:_req_radix_key", "This function looks up a cached prefix by extra_key.")
    def admit(self, req: Req) -> None:
        """Decide whether a request may leave out blocks, and mark its radix key. A second call changes nothing."""
        if not self.bound or hasattr(req, "shift_sparse"):
            return
        reason = next((reason for reason, holds in MUST_BE_EXACT.items() if holds(req)), "")
        req.shift_sparse = SparseRequest(reason)
        req.extra_key = (EXACT if reason else SPARSE) + (req.extra_key or "")

    @contextmanager
    def running(self, batch: ScheduleBatch) -> Iterator[bool]:
        """Inside of this context, the backend leaves out blocks for the chunks of a batch that may do so.

        The context gives whether there are such chunks.
        """
        chunks = self.sparse_chunks(batch) if self.bound else {}
        if not chunks:
            yield False
            return
        records = {index: DroppedMass() for index in chunks}
        for index, request in chunks.items():
            prefix, prompt = batch.prefix_lens[index], len(batch.reqs[index].origin_input_ids)
            request.count(prefix, min(prefix + batch.extend_lens[index], prompt))
        self.backend.sparse = SparseStep(self.bound, records)
        try:
            yield True
        finally:
            self.backend.sparse = None
        self.chunks += len(chunks)
        shared = self.gather([number for record in records.values() for number in record.numbers()])
        width = len(shared[0]) // len(chunks)
        for place, request in enumerate(chunks.values()):
            chunk = DroppedMass()
            for numbers in shared:
                chunk.include(numbers[place * width : (place + 1) * width])
            request.dropped.include(chunk.numbers())
            if 1 - chunk.computed_share < MIN_SKIPPED:
                request.exact = "its chunks could leave out too little"

    def sparse_chunks(self, batch: ScheduleBatch) -> dict[int, SparseRequest]:
        """The requests of a batch whose chunks leave out blocks, by their index.

        Decodes that share the step are exact. So are chunks of few tokens, as they have nothing to save.
        """
        if not batch.forward_mode.is_extend():
            return {}
        prompts = len(batch.reqs) - len(batch.decoding_reqs or ())
        lengths = zip(batch.reqs[:prompts], batch.prefix_lens, batch.extend_lens, strict=False)
        chunks = {}
        for index, (req, prefix, new) in enumerate(lengths):
            request: SparseRequest | None = getattr(req, "shift_sparse", None)
            if request is not None and not request.exact and prefix >= MIN_PREFIX and new >= QUERY_BLOCK:
                chunks[index] = request
        return chunks

    def report(self) -> dict[str, Any] | None:
        """The state for ``/server_info``; None if all chunks are exact."""
        return {"bound": self.bound, "prefix": MIN_PREFIX, "chunks": self.chunks} if self.bound else None
