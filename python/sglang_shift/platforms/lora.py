"""Lets SGLang's LoRA run on a machine without a GPU.

SGLang's backend ``torch_native`` needs no kernels. But SGLang's LoRA also copies through pinned memory, which only a
machine with an accelerator has.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.lora.lora_manager import LoRAManager
from torch.overrides import TorchFunctionMode

from sglang_shift.platforms import cpu
from sglang_shift.seams import overrides, substitutes_for


class _PageableMemory(TorchFunctionMode):
    """Inside of this context, PyTorch does not pin memory. All memory of a CPU is the device's memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.pin_memory:
            return args[0]
        return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})


def _on_cpu(*args: Any, **kwargs: Any) -> bool:
    return cpu.is_active()


@substitutes_for(
    "sglang.srt.lora.lora_manager:LoRAManager", "On a CPU there is no pinned memory, and none is needed.", when=_on_cpu
)
class CpuLoRAManager(LoRAManager):
    """SGLang's manager of LoRA adapters, without pinned memory."""

    @overrides("SGLang's layers pin the offsets of their outputs.")
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _PageableMemory():
            super().__init__(*args, **kwargs)

    @overrides("SGLang's backend pins what it copies for each step.")
    def prepare_lora_batch(self, *args: Any, **kwargs: Any) -> None:
        """Prepare the adapters of a step."""
        with _PageableMemory():
            super().prepare_lora_batch(*args, **kwargs)
