"""Check at start-up that all modes compute the same.

Made-up requests run in TP and in SP, and their logits are compared.

A list of tested models cannot know which kernels and layers SGLang takes on this machine. This check runs them.

How far apart may the logits be? The modes add the same products in another order, so every linear layer rounds
differently. The check measures what such rounding does to this model: it runs TP again, and multiplies the output of
each linear layer by ``1 + noise``. A sum of n terms has a rounding error of about ``sqrt(n)`` units in the last place
(Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019), so the noise has this size. In
float32 the terms are the products of a row. In 16-bit types GEMMs add in float32, and the terms are the parts of the
P ranks. An exchange in fp8 rounds Q, K, V and O to 3 bits of mantissa.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.radix_attention import RadixAttention

from sglang_shift.errors import Refusal
from sglang_shift.layers.adapters import outermost
from sglang_shift.layers.linear import OutputProjection, Projection, QkvProjection
from sglang_shift.modes import MODES, Mode
from sglang_shift.runtime.calibration_steps import SchedulerBench

logger = logging.getLogger(__name__)

LENGTHS = (1, 17, 5)
"""Tokens of the made-up prompts. Their sum is odd, so some rank has fewer tokens than others in every topology."""
MARGIN = 8.0
"""The logits may be this many times farther apart than the noise moves them. A mistake moves them far more."""
ATTEMPTS = 3
"""Attempts with other tokens. After another rounding, a router may choose another expert, if two are close."""
SEED = 20250916
E4M3_ERROR = 2**-4 / math.sqrt(3)
"""The root mean square of the relative error of a number that is rounded to 3 bits of mantissa."""

MODES_DIFFER = Refusal(
    "{model} does not compute the same in {mode} as in TP on this machine: logits are {difference} apart (relative), "
    "and rounding explains {tolerance}; the first difference is at {layer}; serve this model without --sp-size and "
    "--enable-shift-parallel, or add --shift-check off if you know the reason",
    "At start-up, made-up requests run in each mode: [the check](usage.md#the-check-at-start-up).",
)


@dataclass(frozen=True)
class _Shape:
    """The shape of the made-up requests, for :class:`SchedulerBench`."""

    requests: tuple[tuple[int, int], ...] = tuple((0, length) for length in LENGTHS)
    phase: str = "prefill"
    width: int = 1
    context: int = 0
    slots: int = sum(LENGTHS) + len(LENGTHS)


@dataclass
class Trace:
    """What one run has computed.

    Attributes:
        logits: Of a prefill and of a decode step after it, ``[2 * requests, vocabulary]`` in float32. If the model
            pools, this is what it computes in a prefill, as one row.
        attention: By the name of an attention layer, what went into it in the prefill: this rank's heads of all tokens.
    """

    logits: torch.Tensor
    attention: dict[str, torch.Tensor]


class ModeCheck:
    """The check of one rank. All ranks run it together.

    Args:
        scheduler: A :class:`sglang_shift.runtime.scheduler.ShiftScheduler` that is built and idle.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.runner = scheduler.tp_worker.model_runner
        self.bench = SchedulerBench(scheduler)

    def run(self) -> str:
        """Run the check. Return its result in words, for the log.

        Raises:
            Refused: a mode computes something else than TP. All ranks raise it.
        """
        start = time.perf_counter()
        if not self.bench.make_room(_Shape()):  # type: ignore[arg-type]
            return "the KV pool has no room for the check of the modes, so they were not compared"
        worst = {mode.name: self._compare(mode) for mode in MODES if mode is not Mode.TP}
        pipeline = self.runner.exchange_pipeline
        if pipeline.possible and pipeline.first_tokens is None:
            with pipeline.starting_at(1):
                worst["pipelined SP"] = self._compare(Mode.SP)
        if any(map(math.isnan, worst.values())):
            return "the logits of TP are not finite, so the modes were not compared"
        text = ", ".join(f"{name} is within {ratio:.1f} times what rounding explains" for name, ratio in worst.items())
        return f"the modes compute the same ({text}; {time.perf_counter() - start:.1f} s)"

    def _compare(self, mode: Mode) -> float:
        """Compare ``mode`` with TP. Return the distance of the logits in units of the noise, or NaN.

        It is NaN if the logits of TP are not finite: then there is nothing to compare with.
        """
        for attempt in range(ATTEMPTS):
            ids = self._ids(attempt)
            tp, other = self._trace((Mode.TP, Mode.TP), ids), self._trace((mode, mode), ids)
            switched = [self._trace((Mode.TP, mode), ids), self._trace((mode, Mode.TP), ids)]
            with noisy_linears(self.runner, SEED + attempt):
                noisy = self._trace((Mode.TP, Mode.TP), ids)
            difference = max(distance(trace.logits, tp.logits) for trace in (other, *switched))
            noise = distance(noisy.logits, tp.logits)
            difference, noise, finite = self._agree(difference, noise, tp.logits)
            if not finite:
                return math.nan
            if difference <= MARGIN * noise:
                return difference / noise if noise else 0.0
        layers = self._first_layers(tp, other, noisy)
        raise MODES_DIFFER(
            model=type(self.runner.model).__name__,
            mode=mode.name,
            difference=f"{difference:.1e}",
            tolerance=f"{MARGIN * noise:.1e}",
            layer=next(filter(None, layers), "the layers after the last attention"),
        )

    def _agree(self, difference: float, noise: float, logits: torch.Tensor) -> tuple[float, float, bool]:
        """The numbers of the rank with the largest ones, and whether all logits of all ranks are finite."""
        infinite = float(not logits.isfinite().all())
        difference = difference if math.isfinite(difference) else math.inf
        worst, largest, any_infinite = self.bench.agree([difference, noise if math.isfinite(noise) else 0.0, infinite])
        return worst, largest, not any_infinite

    def _ids(self, attempt: int) -> list[list[int]]:
        """Random token ids: of each prompt, and one more for the decode step. They are the same on every rank."""
        generator = torch.Generator().manual_seed(SEED + attempt)
        vocabulary = self.scheduler.model_config.vocab_size
        return [torch.randint(vocabulary, (length + 1,), generator=generator).tolist() for length in LENGTHS]

    def _trace(self, modes: tuple[Mode, Mode], ids: list[list[int]]) -> Trace:
        """Run a prefill in the first mode and a decode in the second mode. No CUDA graph is replayed."""
        attention: dict[str, torch.Tensor] = {}
        with self.runner.graphs.without():
            try:
                self.bench.prepare(_Shape(), [each[:-1] for each in ids])  # type: ignore[arg-type]
                with recorded_attention(self.runner.model, attention):
                    prefill = self.bench.forward(modes[0])
                if not self.runner.is_generation:
                    # A reward is one number and has no spread. So the values of all requests are one row.
                    return Trace(prefill.reshape(1, -1).float(), attention)
                self.bench.decode([each[-1] for each in ids])
                decode = self.bench.forward(modes[1])
            finally:
                self.bench.release()
        return Trace(torch.cat((prefill, decode)).float(), attention)

    def _first_layers(self, tp: Trace, other: Trace, noisy: Trace) -> list[str]:
        """For each rank, the first attention layer whose input differs by more than rounding explains; "" for none."""
        mine = ""
        for name, expected in tp.attention.items():
            tolerance = MARGIN * max(distance(noisy.attention[name], expected), torch.finfo(expected.dtype).eps)
            if other.attention[name].shape != expected.shape or distance(other.attention[name], expected) > tolerance:
                mine = name
                break
        by_rank: list[str] = self.scheduler.tp_group.all_gather_object(mine)
        order = {name: i for i, name in enumerate(tp.attention)}
        return sorted(filter(None, by_rank), key=lambda name: order[name])


def distance(x: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest relative distance of a row of ``x``, ``[n, m]``, from its row of ``reference``, without its mean."""
    x, reference = x.float().flatten(1), reference.float().flatten(1)
    spread = (reference - reference.mean(1, keepdim=True)).norm(dim=1)
    return float(((x - reference).norm(dim=1) / spread.clamp_min(torch.finfo(torch.float32).tiny)).max())


@contextmanager
def recorded_attention(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside of this context, ``inputs`` gets the queries of each attention layer, by the name of the layer."""

    def record(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            query = args[0] if args else next(iter(kwargs.values()))
            inputs.setdefault(name, query.detach().clone())

        return hook

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, RadixAttention)]
    handles = [module.register_forward_pre_hook(record(name), with_kwargs=True) for name, module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def noisy_linears(runner: Any, seed: int) -> Iterator[None]:
    """Inside of this context, TP steps round the output of each linear layer and of each layer of experts anew."""
    generator = torch.Generator().manual_seed(seed)
    ranks = runner.topology.layout.world_size

    def noisy(x: torch.Tensor, terms: int, least: float = 0.0) -> torch.Tensor:
        eps = torch.finfo(x.dtype).eps
        size = max(least, eps / 2 * math.sqrt(terms if x.dtype == torch.float32 else ranks))
        noise = torch.randn(x.shape, generator=generator).to(x.device) * size
        return (x.float() * (1 + noise)).to(x.dtype)

    def of_linear(projection: Projection) -> Callable[..., Any]:
        exchanged = isinstance(projection, QkvProjection | OutputProjection)
        least = E4M3_ERROR if exchanged and runner.topology.exchange.fp8 else 0.0
        return lambda module, args, out: (noisy(out[0], projection.linear.input_size, least), *out[1:])

    def of_experts(experts: Any) -> Callable[..., Any]:
        return lambda module, args, out: noisy(out, experts.hidden_size)

    called = outermost(runner.model)
    handles = [called(p.linear).register_forward_hook(of_linear(p)) for p in runner.sp_model.projections]
    experts = [module for module in runner.model.modules() if isinstance(module, FusedMoE)]
    handles += [called(module).register_forward_hook(of_experts(module)) for module in experts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
