"""Says whether SGLang can decode requests in the steps that compute prompts (``--enable-mixed-chunk``)."""

from __future__ import annotations

from typing import Any

from sglang.srt.model_executor.cuda_graph_config import Backend

GRAPHS = (Backend.BREAKABLE, Backend.FULL, Backend.DISABLED)
"""SGLang's graphs of prefills that may have decodes in them. SGLang does not start with others and mixed chunks."""


def can_mix(settings: Any) -> bool:
    """Return whether a server with these settings starts with mixed chunks.

    With speculative decoding it does for some algorithms. But each request would then get one token in a mixed step
    instead of several, so prompts and decodes take turns there.

    Args:
        settings: A view of the resolved server arguments.
    """
    prefill = getattr(settings.cuda_graph_config, "prefill", None)
    backend = getattr(prefill, "backend", Backend.DISABLED)
    return settings.speculative_algorithm is None and not settings.enable_hisparse and backend in GRAPHS
