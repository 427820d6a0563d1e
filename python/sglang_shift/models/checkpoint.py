"""The sizes of a checkpoint by the headers of its safetensors files: names, shapes and dtypes of its tensors.

Names of linears differ between models, so a tensor's place follows from its shape where that is possible. The headers
are exact for models without experts, latents and quantization. For other models they are off by what SGLang pads or
keeps twice for a kernel.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

from sglang_shift.models.decoder import Decoder, Division
from sglang_shift.models.decoder_config import expert_count, outline_of
from sglang_shift.models.formats import BFLOAT16, Format
from sglang_shift.models.sizes import ModelSizes, Part, total

INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes that SGLang turns into the model's dtype."""

NUMBERED = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
ENCODER = re.compile(r"vis|image|audio|speech|multi_?modal|mm_proj")
MIXER = re.compile(r"linear_attn|mamba|mixer|\.ssm|\.conv|recurrent")
EXPERT = re.compile(r"\.experts?\.|\.experts$")
SKIPPED = re.compile(r"rotary_emb|inv_freq|^mtp\.|masked_bias|attn\.bias$")
"""Buffers that no weight is loaded from, and layers that only speculation uses."""

KV_NAMES = frozenset(("k_proj", "v_proj", "kv_proj", "key_proj", "value_proj", "wk", "wv", "key", "value"))
FUSED_NAMES = frozenset(("qkv_proj", "query_key_value", "c_attn", "wqkv", "Wqkv", "W_pack", "qkv"))
WHOLE_NAMES = frozenset(("q_a_proj", "kv_a_proj_with_mqa", "kv_a_proj", "fused_qkv_a_proj_with_mqa"))
SHARD_NAMES = frozenset(("q_b_proj", "kv_b_proj"))
LATENT_NAMES = frozenset(("kv_b_proj",))
ROW_NAMES = frozenset(
    ("o_proj", "out_proj", "dense", "down_proj", "c_proj", "wo", "w2", "fc2", "fc_out", "dense_4h_to_h")
)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint.

    Attributes:
        name: Its name.
        shape: Its shape.
        dtype: Its dtype, as safetensors names it.
        size: Its bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int

    @property
    def module(self) -> str:
        """The name of the module that has the tensor."""
        return self.name.rpartition(".")[0]

    @property
    def attribute(self) -> str:
        """The name of the tensor in its module."""
        return self.name.rpartition(".")[2]

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return prod(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint; none if some of them are not there."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
        return files if all(file.is_file() for file in files) else []
    files = sorted(folder.glob("*.safetensors"))
    # Mistral's checkpoints have the weights a second time, in one file with other names.
    return [file for file in files if not file.name.startswith("consolidated")] or files


def read_tensors(file: Path) -> Iterator[Tensor]:
    """Yield the tensors of a safetensors file. Only its header is read.

    Raises:
        ValueError: the file has no header of safetensors.
    """
    # The layout is https://huggingface.co/docs/safetensors/index#format: the length of the header, then JSON.
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= file.stat().st_size - 8:
            raise ValueError(f"{file} is no safetensors file")
        header = json.loads(stream.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            yield Tensor(name, tuple(entry["shape"]), entry["dtype"], last - first)


def checkpoint_sizes(folder: Path, hf_config: Any, weights: Format = BFLOAT16) -> ModelSizes | None:
    """Return the sizes of the checkpoint in a folder, or None if its safetensors files are not all there.

    Args:
        folder: The folder.
        hf_config: Its Hugging Face configuration.
        weights: The format into which SGLang quantizes the matrices while it loads them, if it does.

    Raises:
        KeyError, ValueError: the configuration does not say the sizes of the attention, or a file is damaged.
        OSError: a file cannot be read.
    """
    if not (files := weight_files(folder)):
        return None
    tensors = [tensor for file in files for tensor in read_tensors(file)]
    outline = outline_of(hf_config)
    return ModelSizes(total(classify(tensors, outline, expert_count(hf_config), weights)), outline)


def classify(tensors: Iterable[Tensor], outline: Decoder, experts: int, weights: Format = BFLOAT16) -> Iterator[Part]:
    """Yield the parts of the tensors.

    Args:
        tensors: The tensors of a checkpoint.
        outline: The attention and the embedding of its decoder.
        experts: Number of routed experts of a layer.
        weights: The format into which SGLang quantizes the matrices while it loads them, if it does.
    """
    modules: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if not _is_skipped(tensor, outline):
            modules[tensor.module].append(tensor)
    quantized = any(t.dtype not in FLOATS for module in modules.values() for t in module)
    online = weights if not quantized else BFLOAT16
    for name, module in modules.items():
        divisions = _divisions(name, module, outline, experts)
        for tensor in module:
            yield from _parts(tensor, module, divisions, outline, online)


Divisions = Mapping[Division, int | Fraction]
"""The shares of a module's rows that ranks divide in each way. A fused QKV projection has two."""


def _is_skipped(tensor: Tensor, outline: Decoder) -> bool:
    layer = NUMBERED.search(tensor.name)
    return bool(
        SKIPPED.search(tensor.name)
        or (layer and int(layer[1]) >= outline.layers and not ENCODER.search(tensor.name))
        or (outline.tied_embeddings and "lm_head" in tensor.name)
    )


def _divisions(name: str, module: Sequence[Tensor], outline: Decoder, experts: int) -> Divisions:
    """Return how the ranks divide a module, by its name and the shape of its largest tensor."""
    last, shape = name.rpartition(".")[2], max(module, key=lambda tensor: tensor.elements).shape
    if last in FUSED_NAMES and NUMBERED.search(name) and not (ENCODER.search(name) or outline.latent):
        heads = outline.layer.attention
        return {Division.BASE: Fraction(heads.query, heads.qkv), Division.KV: Fraction(2 * heads.kv, heads.qkv)}
    is_table = len(shape) == 2 and shape[0] >= outline.vocabulary
    is_whole = outline.whole_embedding and "lm_head" not in name
    rules = (
        (len(shape) < 2 and "expert" not in name, Division.WHOLE),
        (ENCODER.search(name) or MIXER.search(name), Division.SHARD if len(shape) == 2 else Division.WHOLE),
        (not NUMBERED.search(f"{name}."), Division.VOCABULARY if is_table and not is_whole else Division.WHOLE),
        (EXPERT.search(name) or (len(shape) == 3 and shape[0] == experts), Division.EXPERTS),
        (last in WHOLE_NAMES or shape == (experts, outline.layer.hidden) or shape[0] == 1, Division.WHOLE),
        (last in SHARD_NAMES, Division.SHARD),
        (last in KV_NAMES, Division.KV),
    )
    return {next((division for applies, division in rules if applies), Division.BASE): 1}


def _parts(
    tensor: Tensor, module: Sequence[Tensor], divisions: Divisions, outline: Decoder, online: Format
) -> Iterator[Part]:
    last = tensor.module.rpartition(".")[2]
    is_bias = tensor.attribute == "bias"
    whole = {Division.WHOLE: 1}
    if len(tensor.shape) < 2 and Division.EXPERTS not in divisions and not (is_bias and last not in ROW_NAMES):
        divisions = whole
    is_quantized = any(t.dtype not in FLOATS for t in module)
    kept = tensor.dtype not in FLOATS or is_quantized
    for division, share in divisions.items():
        if kept:
            yield Part(division, stored=tensor.size * share)
        elif online.quantized and len(tensor.shape) > 1 and division not in (Division.VOCABULARY, Division.WHOLE):
            yield Part(division, stored=tensor.elements * share * online.bits / 8)
        else:
            yield Part(division, tensor.elements * share)
    if last in LATENT_NAMES and tensor.attribute in ("weight", "weight_packed", "qweight") and outline.latent:
        # SGLang keeps this projection a second time, as two matrices for absorbed attention.
        latent = outline.latent
        yield Part(Division.SHARD, outline.layer.heads * (latent.nope + latent.value) * latent.rank)
