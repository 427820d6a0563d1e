"""What a reader must know of a plan: experts, latents, and formats without figures."""

from __future__ import annotations

from sglang_shift.tools.plan.hardware import gpus
from sglang_shift.tools.plan.model import Model


def notes(model: Model) -> list[str]:
    """Return what a reader must know of a plan for this kind of model, in sentences."""
    decoder, weights, found = model.decoder, model.format, []
    if experts := decoder.experts:
        total, active = decoder.parameters / 1e9, decoder.active_parameters / 1e9
        found.append(
            f"Experts: {experts.per_token} of {experts.count} compute a token, {active:.1f} of {total:.1f} billion "
            f"parameters. They are {model.experts} in SP, and routing is assumed to be uniform."
        )
    if decoder.latent:
        found.append("Every rank caches the latents of all tokens, so more ranks leave no more KV cache for a token.")
    if weights.quantized and not any(weights.name in gpu.gemms for gpu in gpus().values()):
        found.append(
            f"There are no figures for products of {weights.name} weights. {float(weights.bits):.3g} bits a weight are "
            "read, and arithmetic has the rate of bfloat16."
        )
    if weights.quantized:
        found.append("If a kernel needs S products for S shards in SP, they are counted as one.")
    if decoder.windowed_layers:
        found.append("Layers with a sliding window count as if they attended to all tokens and cached all of them.")
    return found

