"""The weight updater makes the ranks gather the base weights again after an update."""

from __future__ import annotations

from typing import Any

from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

from sglang_shift.seams import overrides


class ShiftWeightUpdater(WeightUpdater):
    """SGLang's weight updater, which also marks the base weights as stale.

    SGLang writes only this rank's TP shards. Stale base weights are gathered again before the next SP step, so they
    get the new values of the other ranks. Every rank sets the mark before SGLang begins, whether the update then
    succeeds or not.
    """

    __slots__ = ()

    @overrides("Our method marks the base weights as stale, so that the ranks gather them again.")
    def update_weights_from_disk(
        self, model_path: str, load_format: str, *args: Any, **kwargs: Any
    ) -> tuple[bool, str]:
        """Return an error for an unknown format, which would end the rank. SGLang rolls back other failures."""
        if load_format.lower() not in list(LoadFormat):
            return False, f"load_format {load_format!r} is unknown; give one of {', '.join(LoadFormat)}"
        self._shards_change()
        return super().update_weights_from_disk(model_path, load_format, *args, **kwargs)

    @overrides("Our method marks the base weights as stale, so that the ranks gather them again.")
    def receive_weights_from_distributed(self, *args: Any, **kwargs: Any) -> Any:
        """Receive weights, which SGLang loads later. A rank that does not receive them does not load them either."""
        self._shards_change()
        return super().receive_weights_from_distributed(*args, **kwargs)

    @overrides("Our method marks the base weights as stale, so that the ranks gather them again.")
    def update_weights_from_tensor(self, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        self._shards_change()
        return super().update_weights_from_tensor(*args, **kwargs)

    @overrides("Our method marks the base weights as stale, so that the ranks gather them again.")
    def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        self._shards_change()
        return super().update_weights_from_ipc(*args, **kwargs)

    @overrides("Our method marks the base weights as stale, so that the ranks gather them again.")
    def end_weight_update(self, *args: Any, **kwargs: Any) -> None:
        """End an update session. During it, SGLang may have let others write the parameters directly."""
        self._shards_change()
        super().end_weight_update(*args, **kwargs)

    def _shards_change(self) -> None:
        self.get_model_runner().base_weights.stale = True
