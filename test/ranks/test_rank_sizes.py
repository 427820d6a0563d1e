"""The sizes of weights against what ranks of stock SGLang hold, for decoders of many kinds."""

from __future__ import annotations

import pytest
from sglang_shift.models.families import FAMILIES
from sglang_shift.models.sizes import ModelSizes
from tiny_decoders import DECODERS, on_first_rank, rank_bytes, sglang_config

CLOSE = 0.012
"""With 64 hidden states, biases and norms are up to this part of a model. With thousands they are next to nothing."""

NOT_BUILT = {
    "exaone4": "SGLang's class takes the pattern of windows as a text, and this transformers takes it as a number",
    "smollm3": "SGLang has no class of its own",
    "nemotron": "SGLang takes transformers' class, which has no TP",
    "phimoe": "SGLang takes transformers' class, which has no TP",
}
BUILT = [name for name in DECODERS if name not in NOT_BUILT]


def sizes_on_rank():
    """Return the bytes that this rank holds of each decoder, and the bytes that are computed."""
    from sglang.srt.models.registry import ModelRegistry

    found = {}
    for name in BUILT:
        config = sglang_config(name).hf_config
        model_class, _ = ModelRegistry.resolve_model_cls(config.architectures)
        held = rank_bytes(model_class(config=config))
        sizes = ModelSizes.of(config)
        latent = sizes.decoder.latent
        # These are made after loading: the projection from the latent, a second time.
        copies = latent.rank * (latent.nope + latent.value) * 4 * 2 * 4 // 2 if latent else 0
        found[name] = held, sizes.weight_bytes(2, 1, 4) - copies
    return found


@pytest.fixture(scope="module")
def sizes():
    import sglang.srt.models.registry  # noqa: F401  # it imports all models, here once for both ranks

    return on_first_rank(2, sizes_on_rank)


@pytest.mark.parametrize("name", BUILT)
def test_a_rank_holds_what_is_computed(sizes, name):
    held, computed = sizes[name]
    assert computed == pytest.approx(held, rel=CLOSE)


@pytest.mark.parametrize("name", [family.model_type for family in FAMILIES.values()])
def test_of_the_dense_families_it_holds_exactly_that(sizes, name):
    held, computed = sizes[name]
    assert computed == held
