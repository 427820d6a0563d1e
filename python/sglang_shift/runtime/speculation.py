"""Speculative decoding: what a decode step computes.

SGLang's draft worker proposes tokens for each request, and the model verifies them in one step. The draft worker runs
in TP outside of our steps. The step that verifies runs in the mode that the policy chooses.
"""

from __future__ import annotations

from sglang.srt.runtime_context import get_spec


def verify_width() -> int:
    """Tokens of each request in a decode step: the drafts that the step verifies; 1 without speculative decoding."""
    spec = get_spec()
    return int(spec.speculative_num_draft_tokens or 1) if spec.speculative_algorithm is not None else 1
