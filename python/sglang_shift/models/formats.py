"""The formats of quantized weights: bytes of a weight, and the modules that stay in the model's dtype.

A format is read from the quantization in a ``config.json``, by the fields that SGLang reads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cached_property
from typing import Any

SCALE_BITS = 16
"""Bits of the scale of a group."""

MX_BITS, NV_BITS = Fraction(17, 4), Fraction(9, 2)
"""Bits of a 4-bit float with its share of an 8-bit scale: one scale for 32 weights (MX), or for 16 weights (NV)."""


@dataclass(frozen=True)
class Format:
    """A format of weights.

    Attributes:
        name: ``bfloat16``, ``fp8`` (a scale per channel and token), ``fp8_block`` (a scale per 128 x 128), ``int8``, or
            a name of a format of fewer bits.
        bits: Bits of a weight with its share of the scales. Scales of whole channels or blocks are left out.
        quantizes_inputs: Whether the input of each matrix is quantized as well.
        exempt: Patterns of the modules that are not quantized.
    """

    name: str
    bits: Fraction
    quantizes_inputs: bool = False
    exempt: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether it differs from the model's dtype."""
        return self != BFLOAT16

    def exempt_share(self, names: Sequence[str], layers: int) -> Fraction:
        """Return the share of the layers in which the module of one of the names is not quantized."""
        if not (self.exempt and names and layers):
            return Fraction(0)
        found = [any(self._exempts(f"model.layers.{i}.{name}") for name in names) for i in range(layers)]
        return Fraction(sum(found), layers)

    def _exempts(self, module: str) -> bool:
        return bool(self._expression and self._expression.search(module)) or any(
            _names(pattern, module) for pattern in self._globs
        )

    @cached_property
    def _expression(self) -> re.Pattern[str] | None:
        """The patterns without a wildcard as one expression, because there may be one for each module of the model."""
        plain = [re.escape(p.strip(".")) for p in self.exempt if not _is_wild(p)]
        wild = [f"^(?:{p.removeprefix('re:')})" for p in self.exempt if p.startswith("re:")]
        parts = [*([rf"(?:^|\.)(?:{'|'.join(plain)})(?:\.|$)"] if plain else []), *wild]
        return re.compile("|".join(parts)) if parts else None

    @cached_property
    def _globs(self) -> tuple[str, ...]:
        return tuple(p for p in self.exempt if _is_wild(p) and not p.startswith("re:"))


BFLOAT16 = Format("bfloat16", Fraction(16))
FP8 = Format("fp8", Fraction(8), quantizes_inputs=True)
FP8_BLOCK = Format("fp8_block", Fraction(8), quantizes_inputs=True)
INT8 = Format("int8", Fraction(8), quantizes_inputs=True)
FORMATS = {f.name: f for f in (BFLOAT16, FP8, FP8_BLOCK, INT8)}
"""Formats that have nothing more to say than their names."""


def _is_wild(pattern: str) -> bool:
    return pattern.startswith("re:") or "*" in pattern or "?" in pattern


def _names(pattern: str, module: str) -> bool:
    """Whether a pattern with wildcards names a module, or a module above it."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*") or fnmatchcase(module, f"*.{pattern}")


def format_of(quantization: Any, key: str = "quantization_config") -> Format:
    """Return the format that a ``config.json`` describes.

    Args:
        quantization: The value of the field; empty if the weights are not quantized.
        key: The name of the field.

    Raises:
        ValueError: the size of these weights is not known.
    """
    if not quantization:
        return BFLOAT16
    if not isinstance(quantization, dict):
        raise ValueError(f"{key} {quantization!r} is not an object")
    method = quantization.get("quant_method")
    if method in READERS:
        name, bits, quantizes_inputs = READERS[method](quantization)
        return Format(name, bits, quantizes_inputs, _exempt(quantization))
    raise ValueError(f"quantization {method}, for which there are no figures")


def format_of_flag(method: str | None) -> Format:
    """Return the format into which SGLang quantizes weights of the model's dtype, by the value of ``--quantization``.

    Any other method counts as the model's dtype, which takes no less memory.
    """
    return {"fp8": FP8, "w8a8_fp8": FP8, "w8a8_int8": INT8}.get(method or "", BFLOAT16)


Reading = tuple[str, Fraction, bool]
"""The name, the bits, and whether inputs are quantized."""


def _of(known: Format) -> Reading:
    return known.name, known.bits, known.quantizes_inputs


def _fp8(quantization: dict[str, Any]) -> Reading:
    return _of(FP8_BLOCK if quantization.get("weight_block_size") else FP8)


def _grouped(bits: Any, group: Any, zeros: bool, method: str) -> Reading:
    """Return the reading of integers with a 16-bit scale for each group. Zeros have as many bits as a weight."""
    if type(bits) is not int or not 1 <= bits <= 16:
        raise ValueError(f"quantization {method}, for which there are no bits")
    overhead = Fraction(SCALE_BITS + (bits if zeros else 0), group) if type(group) is int and group > 0 else 0
    return f"int{bits}", Fraction(bits) + overhead, False


def _awq(quantization: dict[str, Any]) -> Reading:
    bits = quantization.get("bits", quantization.get("w_bit"))
    group = quantization.get("group_size", quantization.get("q_group_size"))
    return _grouped(bits, group, bool(quantization.get("zero_point", True)), "awq")


def _gptq(quantization: dict[str, Any]) -> Reading:
    return _grouped(quantization.get("bits"), quantization.get("group_size"), True, "gptq")


def _compressed(quantization: dict[str, Any]) -> Reading:
    """Read a format of compressed-tensors. Of several groups, the one with the most bits counts."""
    layout = str(quantization.get("format"))
    weights = [g["weights"] for g in (quantization.get("config_groups") or {}).values() if g.get("weights")]
    if layout == "float-quantized":
        return _of(FP8_BLOCK if any(w["strategy"] == "block" for w in weights) else FP8)
    if layout == "int-quantized":
        return _of(INT8)
    if layout.startswith("nvfp4"):
        return "nvfp4", NV_BITS, False
    if layout.startswith("mxfp4"):
        return "mxfp4", MX_BITS, False
    bits = max((w.get("num_bits") or 0 for w in weights), default=None)
    group = min((w.get("group_size") or 0 for w in weights), default=None)
    zeros = any(not w.get("symmetric", True) for w in weights)
    return _grouped(bits, group, zeros, "compressed-tensors")


def _modelopt(quantization: dict[str, Any]) -> Reading:
    algorithm = str(quantization.get("quant_algo") or quantization.get("quantization", {}).get("quant_algo"))
    if algorithm.startswith("FP8"):
        return _of(FP8)
    if algorithm.startswith("NVFP4"):
        return "nvfp4", NV_BITS, False
    raise ValueError(f"quantization modelopt {algorithm}, for which there are no figures")


READERS = {
    "fp8": _fp8,
    "w8a8_fp8": lambda quantization: _of(FP8),
    "w8a8_int8": lambda quantization: _of(INT8),
    "blockwise_int8": lambda quantization: _of(INT8),
    "compressed-tensors": _compressed,
    "awq": _awq,
    "gptq": _gptq,
    "modelopt": _modelopt,
    "modelopt_fp8": _modelopt,
    "modelopt_fp4": _modelopt,
    "mxfp4": lambda quantization: ("mxfp4", MX_BITS, False),
}
"""What reads the fields of each ``quant_method``."""

EXEMPT_FIELDS = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")
"""Fields that list modules which are not quantized."""


def _exempt(quantization: dict[str, Any]) -> tuple[str, ...]:
    listed = [name for field in EXEMPT_FIELDS for name in quantization.get(field) or ()]
    # A key of GPTQ's ``dynamic`` that begins with ``-:`` is an expression for modules to leave out.
    listed += [f"re:{key[2:]}" for key in quantization.get("dynamic") or {} if key.startswith("-:")]
    return tuple(name for name in listed if isinstance(name, str))
