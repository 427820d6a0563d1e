"""Computes the sizes of a dense decoder layer, and the sizes of its matrices and messages in TP and in SP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_shift.errors import ShiftError
from sglang_shift.models.families import Role
from sglang_shift.models.heads import Heads

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Fields of ``config.json`` that count experts."""

MOST = 2**31 - 1


@dataclass(frozen=True)
class Layer:
    """The sizes of a dense decoder layer. Heads are counts, and the other sizes are elements."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def attention(self) -> Heads:
        """The heads of the layer, which the ranks divide."""
        return Heads(self.heads, self.kv_heads)

    @property
    def parameters(self) -> int:
        """Number of weights of its GEMMs: queries, keys and values; output; gate and up; down."""
        return sum(outputs * inputs for outputs, inputs in self._matrices(self.attention, self.intermediate).values())

    def shards(self, ranks: int) -> dict[Role, tuple[int, int]]:
        """Return outputs and inputs of each of a rank's GEMMs in TP, in the order of a forward.

        Raises:
            ShiftError: the layer cannot be divided by ``ranks``.
        """
        uneven = ranks < 1 or not self.attention.divides_queries(ranks) or self.intermediate % ranks
        if uneven or not self.attention.divides_kv(ranks):
            raise ShiftError(
                f"{ranks} ranks for {self.heads} heads, {self.kv_heads} KV heads and an intermediate size of "
                f"{self.intermediate}; give a number that divides the heads and the size, and that divides the KV "
                "heads or is divided by them"
            )
        return self._matrices(self.attention.of_rank(ranks), self.intermediate // ranks)

    def _matrices(self, heads: Heads, intermediate: int) -> dict[Role, tuple[int, int]]:
        queries = heads.query * self.head_dim
        return {
            Role.QKV: (heads.qkv * self.head_dim, self.hidden),
            Role.OUTPUT: (self.hidden, queries),
            Role.GATE_UP: (2 * intermediate, self.hidden),
            Role.DOWN: (self.hidden, intermediate),
        }

    def all_reduce_bytes(self, ranks: int, element_bytes: int) -> float:
        """Return the bytes per token that a rank sends in TP: two ring all-reduces of the hidden states.

        A ring sends ``2 (P - 1) / P`` times its input:
        https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
        """
        return 2 * self.hidden * element_bytes * 2 * (ranks - 1) / ranks

    def exchange_bytes(self, ranks: int, element_bytes: int) -> float:
        """Return the bytes per token that a rank sends in SP = P: other ranks' heads, for its share of the tokens.

        Queries, keys and values go one way, and the attention's output goes the other way.
        """
        heads = self.attention.of_base_rank(ranks, ranks)
        return (heads.qkv + heads.query) * self.head_dim * element_bytes * (ranks - 1) / ranks**2


def size_in(config: dict[str, Any], name: str, default: int | None = None, least: int = 1) -> int:
    """Return a size from the content of a ``config.json``. Null counts as absent.

    Raises:
        KeyError: the size is absent, and there is no default.
        ValueError: the size is not a whole number, is less than ``least``, or is more than any model has.
    """
    size = config.get(name)
    if size is None and (size := default) is None:
        raise KeyError(name)
    if type(size) is not int or size < least:  # ``isinstance`` would accept a bool, which is an int
        raise ValueError(f"{name} {size!r} is not a whole number of at least {least}")
    if size > MOST:
        raise ValueError(f"{name} {size} is more than {MOST}")
    return size


def check_dense(config: dict[str, Any]) -> None:
    """Check that all tokens use all weights.

    Raises:
        ValueError: there are experts, which only some tokens use.
    """
    if any(config.get(key) for key in EXPERTS):
        raise ValueError("experts, which not every token goes through")


def layer_of(config: dict[str, Any]) -> tuple[Layer, str]:
    """Return the layer's sizes and the dtype from the content of a ``config.json``.

    Raises:
        AttributeError, KeyError, ValueError: the content is not that of a dense decoder.
    """
    check_dense(config)
    hidden, heads = size_in(config, "hidden_size"), size_in(config, "num_attention_heads")
    layer = Layer(
        hidden=hidden,
        intermediate=size_in(config, "intermediate_size"),
        heads=heads,
        kv_heads=size_in(config, "num_key_value_heads", heads),
        head_dim=size_in(config, "head_dim", hidden // heads),
    )
    if layer.heads % layer.kv_heads:
        raise ValueError(f"num_key_value_heads {layer.kv_heads} does not divide num_attention_heads {layer.heads}")
    dtype = config.get("dtype") or config["torch_dtype"]
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"dtype {dtype}")
    return layer, dtype
