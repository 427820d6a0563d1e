"""Defines the settings of a server: one record, which is equal on every rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ShiftConfig:
    """The resolved settings of a deployment.

    The policy ``queue-depth`` uses ``enter_requests``, ``leave_requests``, ``enter_tokens`` and ``leave_tokens``:
    :class:`sglang_shift.policy.builtin.QueueDepth`.

    Attributes:
        world_size: P.
        sp_size: S.
        switching: Whether two steps may have different modes (``--enable-shift-parallel``).
        policy: The name of the policy that chooses the mode of each step, or ``module:Class``.
        threshold: A number of tokens, for the policies ``tokens`` and ``queue-depth``.
        enter_requests: The queue is deep from this many waiting requests on.
        leave_requests: The queue can be short again only below this many waiting requests.
        enter_tokens: The queue is deep from this many pending prompt tokens on.
        leave_tokens: The queue can be short again only below this many pending prompt tokens.
        tbt_target: The longest gap between two tokens of a request, in milliseconds; 0 for no bound.
        sparse_prefill: The softmax mass that chunks of prompts may leave out of each query; 0 for none.
        calibration: ``auto``, ``off``, or a file.
        exchange: The backend of the exchange: ``auto``, ``flashinfer`` or ``collective``.
        exchange_dtype: The data that the exchange sends: ``auto`` for unchanged activations, or ``fp8``.
        exchange_pipeline: ``auto``, ``on`` or ``off``: whether SP steps exchange their heads group by group.
        experts: ``sharded`` or ``replicated``, for SP steps.
        check: ``on`` if the server compares the modes when it starts, otherwise ``off``.
        graph_buckets: The most CUDA graphs of each phase in SP; None for all sizes that the policy may run in SP.
        instances: The number of instances that the server starts with; 0 for a server without instances.
        merge_levels: The numbers of ranks of merged instances, with commas; empty for all powers of two.
        instance_policy: The policy that merges and splits instances, or ``fixed``.
        merge_weights: ``keep``, or ``free`` if merged instances free weights for more KV cache.
    """

    world_size: int
    sp_size: int
    switching: bool
    policy: str
    threshold: int = 256
    enter_requests: int = 32
    leave_requests: int = 16
    enter_tokens: int = 2048
    leave_tokens: int = 512
    tbt_target: float = 0.0
    sparse_prefill: float = 0.0
    calibration: str = "off"
    exchange: str = "auto"
    exchange_dtype: str = "auto"
    exchange_pipeline: str = "off"
    experts: str = "sharded"
    check: str = "on"
    graph_buckets: int | None = None
    instances: int = 0
    merge_levels: str = ""
    instance_policy: str = "fixed"
    merge_weights: str = "keep"
