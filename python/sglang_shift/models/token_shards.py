"""Among how many ranks the tokens of a KV cache can be divided: D, SGLang's ``--dcp-size``.

The ranks of a group must hold the same KV heads. Otherwise a rank would store keys of its own heads for tokens that
another rank reads with other heads, and every answer would be wrong without an error. With latent attention (MLA), all
ranks hold the same latents.
"""

from __future__ import annotations

from sglang_shift.errors import Refusal
from sglang_shift.models.heads import Heads

NOT_SHARED = Refusal(
    "--dcp-size {D} is not possible with --tp-size {P} and {N} KV heads, because no two ranks hold the same KV head; "
    "leave it out",
    "Ranks can divide the tokens of a KV head among them only if all of them hold it. SGLang does not check this, and "
    "its answers would be wrong.",
)
NOT_A_DIVISOR = Refusal(
    "--dcp-size {D} does not divide the {R} ranks that hold the same KV head with --tp-size {P} and {N} KV heads; give "
    "auto, which is {R} here, or a smaller divisor of {R}",
    "D is at most P / KV heads, and divides it. SGLang does not check this, and its answers would be wrong.",
)

NOT_A_DIVISOR_OF_P = Refusal(
    "--dcp-size {D} does not divide --tp-size {P}; with latent attention (MLA) give auto, which is {P} here, or a "
    "smaller divisor of {P}",
    "All ranks hold the same latents, and groups of D of them divide the tokens.",
)


def most_token_shards(heads: Heads, ranks: int) -> int:
    """Return the number of ranks that hold the same KV heads, of P ranks. It is the largest D, and 1 for nothing."""
    return max(1, ranks // heads.kv)


def check_token_shards(heads: Heads, ranks: int, count: int) -> None:
    """Check that groups of ``count`` ranks can divide the tokens of a KV cache.

    Args:
        heads: The heads of the model.
        ranks: P.
        count: D.

    Raises:
        Refused: they cannot.
    """
    most = most_token_shards(heads, ranks)
    if count > 1 and most == 1:
        raise NOT_SHARED(D=count, P=ranks, N=heads.kv)
    if count < 1 or most % count:
        raise NOT_A_DIVISOR(D=count, P=ranks, N=heads.kv, R=most)


def check_latent_shards(ranks: int, count: int) -> None:
    """Check that groups of ``count`` ranks can divide the tokens of a cache of latents.

    Args:
        ranks: P.
        count: D.

    Raises:
        Refused: they cannot.
    """
    if count < 1 or ranks % count:
        raise NOT_A_DIVISOR_OF_P(D=count, P=ranks)
