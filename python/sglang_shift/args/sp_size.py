"""Choose S for ``--sp-size auto``, from the memory that weights and KV cache take on a rank.

The launcher does this before it starts any process. It does not use an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
from sglang.srt.utils import get_device_memory_capacity

from sglang_shift.errors import Refusal
from sglang_shift.flags import AUTO
from sglang_shift.models.checkpoint import checkpoint_sizes
from sglang_shift.models.decoder_config import architecture_of
from sglang_shift.models.formats import Format, format_of, format_of_flag
from sglang_shift.models.sizes import MIB, SHARDED, ModelSizes, cache_of, size_text
from sglang_shift.platforms.cpu import ShiftCpuPlatform, local_ranks

# On a machine without a GPU, the weights and KV pools of all its ranks together may take this share of the free
# memory. The rest is for activations, and for the processes themselves.
CPU_FRACTION = 0.8

T = TypeVar("T")

NOT_A_SIZE = Refusal(
    "sp_size {value} is neither a whole number of ranks nor 'auto'",
    "From Python, the value must be None, an int or 'auto'.",
)
MEMORY_UNKNOWN = Refusal(
    "--sp-size auto cannot read the memory of this device; give --sp-size a number",
    "SGLang does not know how much memory this kind of device has.",
)
SIZE_UNKNOWN = Refusal(
    "--sp-size auto cannot tell the size of {name}: neither safetensors files on this machine nor its config.json say "
    "it ({problem}); give --sp-size a number",
    "The size of the weights follows from the files of the checkpoint, or from the fields of its config.json.",
)
NO_ROOM_FOR_THE_POOL = Refusal(
    "--sp-size auto finds no S whose weights fit beside {pool} ({numbers}); give a larger --tp-size, a smaller "
    "--context-length or --max-total-tokens, --sp-size {S} with a pool of what is left, or serve without sequence "
    "parallelism",
    "The message has the bytes of each candidate. [Choose P and S](usage.md#choose-p-and-s) says how much the KV "
    "pool must have.",
)
NO_ROOM_FOR_THE_WEIGHTS = Refusal(
    "--sp-size auto finds no S whose weights fit beside {pool} ({numbers}); give a larger --tp-size, or serve without "
    "sequence parallelism",
    "Not even the weights of the smallest S fit.",
)


@dataclass(frozen=True)
class SpSizeDecision:
    """The S of ``--sp-size auto``, with its reason.

    Attributes:
        sp_size: S.
        reason: One sentence for the log, with the size of the weights for each candidate.
    """

    sp_size: int
    reason: str


@dataclass(frozen=True)
class Pool:
    """The KV pool that base weights must leave room for.

    Attributes:
        minimum: Bytes. If no S leaves this much, the server refuses to start.
        target: Bytes, ``minimum`` or more. The choice is the largest S that leaves this much.
        description: A text that says how ``minimum`` and ``target`` follow from the settings.
    """

    minimum: int
    target: int
    description: str


def check_sp_size(value: Any) -> None:
    """Check a ``sp_size`` that was given from Python: it must be None, an integer or ``"auto"``.

    Raises:
        Refused: it is something else.
    """
    if value is None or value == AUTO or (isinstance(value, int) and not isinstance(value, bool)):
        return
    raise NOT_A_SIZE(value=repr(value))


def uses_shift_cpu_platform() -> bool:
    """Whether SGLang's platform on this machine is :class:`sglang_shift.platforms.cpu.ShiftCpuPlatform`."""
    from sglang.srt.platforms import current_platform

    return isinstance(current_platform, ShiftCpuPlatform)


def rank_memory_bytes(settings: Any) -> int:
    """The memory of a rank for weights and KV pool together, in bytes.

    On an accelerator it is the capacity, as SGLang reads it, times ``--mem-fraction-static``. The launcher does not
    know how much memory other processes hold. On a CPU it is this rank's share of :data:`CPU_FRACTION` of the memory
    that is free now.

    Args:
        settings: A view of the resolved server arguments.

    Raises:
        Refused: the capacity cannot be read.
    """
    if uses_shift_cpu_platform():
        return int(psutil.virtual_memory().available * CPU_FRACTION / local_ranks(settings))
    capacity = get_device_memory_capacity(settings.device)  # MiB
    if not capacity:
        raise MEMORY_UNKNOWN()
    return int(capacity * MIB * settings.mem_fraction_static)


MIN_POOL_DIVISOR = 8
"""If the user gave no size of the KV pool, the pool needs 1/8 of the memory, or room for the longest request."""


def pool_of(settings: Any, model_config: Any, memory: int) -> Pool:
    """The KV pool that weights must leave room for. Pool and weights share ``memory``, in bytes.

    If ``--max-total-tokens`` has a value, minimum and target are the size of that many tokens. On a CPU it always
    has a value, because the platform sizes the pool without regard to S.

    Otherwise the target has room for one request of the model's full context, and is at least half of the memory.
    The pool limits how many requests run at a time, and so it limits the throughput. A larger S only saves
    communication in steps that have many tokens anyway. Once the pool has half of the memory, a smaller S could not
    even double the pool. The minimum is smaller, 1/8 of the memory: SGLang serves shorter requests even if the
    longest request has no room.
    """
    kv_dtype = str(settings.kv_cache_dtype)
    kv_bytes = 1 if kv_dtype.startswith(("fp8", "mxfp8", "nvfp4", "fp4")) else model_config.dtype.itemsize
    kv_bytes = 2 if kv_dtype in ("bf16", "bfloat16") else kv_bytes
    per_token = _known(model_config, cache_of).bytes_per_token(settings.tp_size, kv_bytes)
    if settings.max_total_tokens is not None:
        size = settings.max_total_tokens * per_token
        return Pool(size, size, f"a KV pool of {settings.max_total_tokens} tokens ({size_text(size)})")
    context = model_config.context_len
    longest = -(-context // settings.dcp_size) * per_token  # D ranks divide the tokens of a request
    target = max(longest, memory // 2)
    what = f"half of the memory, {size_text(target)}" if target > longest else f"{size_text(target)}"
    description = f"a KV pool of {what} (one request of {context} tokens needs {size_text(longest)})"
    return Pool(min(longest, memory // MIN_POOL_DIVISOR), target, description)


def weight_bytes(settings: Any, model_config: Any, candidates: Iterable[int]) -> dict[int, int]:
    """Return the bytes of the base weights on a rank for each candidate S.

    Args:
        settings: A view of the resolved server arguments.
        model_config: SGLang's configuration of the model.
        candidates: Values of S.

    Raises:
        Refused: neither the files of the checkpoint nor its configuration say the sizes.
    """
    sizes, element_bytes = model_sizes(settings, model_config), model_config.dtype.itemsize
    experts = getattr(settings, "shift_experts", None) or SHARDED
    whole = getattr(settings, "instances", None) is not None
    return {s: sizes.weight_bytes(settings.tp_size, s, element_bytes, experts, whole_tables=whole) for s in candidates}


def model_sizes(settings: Any, model_config: Any) -> ModelSizes:
    """Return the sizes of the model: by the headers of its safetensors files if they are here, or by its config.json.

    Raises:
        Refused: neither says the sizes.
    """
    hf_config, folder = model_config.hf_config, local_folder(settings, model_config)
    online = format_of_flag(getattr(settings, "quantization", None))
    try:
        if folder and (sizes := checkpoint_sizes(folder, hf_config, online)):
            return sizes
    except (KeyError, ValueError, TypeError, OSError):
        pass  # a file is damaged or has another layout; the loader says so if it matters
    return _known(model_config, lambda config: ModelSizes.of(config, _format(settings, config)))


def local_folder(settings: Any, model_config: Any) -> Path | None:
    """Return the folder of the model's files if it is on this machine, maybe in the cache of the hub, or None."""
    path = getattr(model_config, "model_path", None)
    if path is None or getattr(settings, "load_format", "auto") == "dummy":
        return None
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        revision, cache = getattr(settings, "revision", None), getattr(settings, "download_dir", None)
        return Path(snapshot_download(path, revision=revision, cache_dir=cache, local_files_only=True))
    except (OSError, ValueError):  # it is not in the cache, or is no name of the hub
        return None


def _format(settings: Any, hf_config: Any) -> Format:
    """Return the format of the weights in memory: that of the checkpoint, or that of ``--quantization``.

    Raises:
        ValueError: the size of the checkpoint's format is not known.
    """
    quantization = getattr(hf_config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return format_of(quantization) if quantization else format_of_flag(getattr(settings, "quantization", None))


def _known(model_config: Any, read: Callable[[Any], T]) -> T:
    """Return what a function reads from the model's configuration.

    Raises:
        Refused: the configuration does not say it.
    """
    hf_config = model_config.hf_config
    try:
        return read(hf_config)
    except KeyError as error:
        problem = f"no {error.args[0]}"
    except (ValueError, TypeError) as error:
        problem = str(error)
    raise SIZE_UNKNOWN(name=architecture_of(hf_config) or "this model", problem=problem)


def choose_sp_size(weights: Mapping[int, int], memory: int, pool: Pool) -> SpSizeDecision:
    """Choose the largest S that leaves the target of the pool.

    If no S does, choose the smallest S, which leaves the largest pool. That pool must have the minimum.

    Args:
        weights: Bytes of base weights for each candidate S.
        memory: Bytes that weights and pool share.
        pool: The KV pool that weights must leave room for.

    Raises:
        Refused: no candidate leaves the minimum of the pool.
    """
    table = ", ".join(f"S={s} {size_text(weights[s])}" for s in sorted(weights))
    numbers = f"weights a rank: {table}; {size_text(memory)} for weights and pool together"
    if fitting := [s for s in weights if weights[s] + pool.target <= memory]:
        s = max(fitting)
        which = "the largest candidate, and its weights fit" if s == max(weights) else "the largest that fits"
        return SpSizeDecision(s, f"S={s} is {which} beside {pool.description}; {numbers}")
    s = min(weights)
    if weights[s] + pool.minimum <= memory:
        left = size_text(memory - weights[s])
        return SpSizeDecision(s, f"no S fits beside {pool.description}; S={s} leaves the most, {left}; {numbers}")
    if weights[s] < memory:
        raise NO_ROOM_FOR_THE_POOL(pool=pool.description, numbers=numbers, S=s)
    raise NO_ROOM_FOR_THE_WEIGHTS(pool=pool.description, numbers=numbers)


def auto_sp_size(server_args: Any) -> SpSizeDecision:
    """Choose S for ``--sp-size auto``. SGLang must have resolved its settings, and the model must be checked.

    Raises:
        Refused: no S fits, or the memory cannot be read.
    """
    settings, model_config = resolving_view(server_args), model_config_of(server_args)
    world_size, memory = settings.tp_size, rank_memory_bytes(settings)
    smallest = settings.instances or 2  # each instance must hold the whole weights
    candidates = [s for s in range(smallest, world_size + 1) if world_size % s == 0]
    weights = weight_bytes(settings, model_config, candidates)
    return choose_sp_size(weights, memory, pool_of(settings, model_config, memory))
