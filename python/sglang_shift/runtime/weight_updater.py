"""The weight updater: SGLang's, after which the base weights are gathered again."""

from __future__ import annotations

from typing import Any

from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

from sglang_shift.seams import overrides


class ShiftWeightUpdater(WeightUpdater):
    """SGLang writes this rank's TP shards; the other ranks' parts of its base weights follow before the next SP step.

    Noted as SGLang begins, on all ranks alike, whether it then succeeds or not.
    """

    __slots__ = ()

    @overrides("notes that base weights must be gathered again")
    def update_weights_from_disk(
        self, model_path: str, load_format: str, *args: Any, **kwargs: Any
    ) -> tuple[bool, str]:
        """As SGLang's (which rolls back after a failure); an unknown format is an error, not the end of the rank."""
        if load_format.lower() not in list(LoadFormat):
            return False, f"load_format {load_format!r} is unknown; give one of {', '.join(LoadFormat)}"
        self._shards_change()
        return super().update_weights_from_disk(model_path, load_format, *args, **kwargs)

    @overrides("notes that base weights must be gathered again")
    def receive_weights_from_distributed(self, *args: Any, **kwargs: Any) -> Any:
        """As SGLang's; a rank that fails to receive does not load."""
        self._shards_change()
        return super().receive_weights_from_distributed(*args, **kwargs)

    @overrides("notes that base weights must be gathered again")
    def update_weights_from_tensor(self, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        """As SGLang's."""
        self._shards_change()
        return super().update_weights_from_tensor(*args, **kwargs)

    @overrides("notes that base weights must be gathered again")
    def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        """As SGLang's."""
        self._shards_change()
        return super().update_weights_from_ipc(*args, **kwargs)

    @overrides("notes that base weights must be gathered again")
    def end_weight_update(self, *args: Any, **kwargs: Any) -> None:
        """As SGLang's, which may have let others write the parameters directly."""
        self._shards_change()
        super().end_weight_update(*args, **kwargs)

    def _shards_change(self) -> None:
        self.get_model_runner().base_weights.stale = True
