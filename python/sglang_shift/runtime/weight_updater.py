"""The weight updater makes the ranks gather the base weights again after an update, and undoes failed updates."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

from sglang_shift.errors import ShiftError
from sglang_shift.runtime.agreement import from_all_ranks
from sglang_shift.seams import overrides, relies_on

FORMATS = (
    LoadFormat.AUTO,
    LoadFormat.PT,
    LoadFormat.SAFETENSORS,
    LoadFormat.INSTANTTENSOR,
    LoadFormat.NPCACHE,
    LoadFormat.MISTRAL,
    LoadFormat.LAYERED,
    LoadFormat.FASTSAFETENSORS,
)
"""The formats of which SGLang can load new weights in place. FlashRL's would replace our views by weights in FP8."""

PARTLY_LOADED = "Failed to update weights"
"""How SGLang's message begins if it failed after it may have written parameters."""


class Loaded(IntEnum):
    """What this rank holds after it was told to load weights."""

    OLD = 0
    PARTLY = 1
    NEW = 2


class ShiftWeightUpdater(WeightUpdater):
    """SGLang's weight updater, which also marks the base weights as stale.

    SGLang writes only this rank's TP shards. Stale base weights are gathered again before the next SP step, so they
    get the new values of the other ranks. Every rank sets the mark before SGLang begins, whether the update then
    succeeds or not.
    """

    __slots__ = ()

    @overrides("Our method marks the base weights as stale, and loads the old weights again if a rank fails.")
    @relies_on(
        "sglang.srt.model_loader.loader:get_model_loader", "This function decides which formats have another loader."
    )
    @relies_on(
        "sglang.srt.model_loader.loader:DefaultModelLoader._prepare_weights", "This method raises for other formats."
    )
    def update_weights_from_disk(
        self,
        model_path: str,
        load_format: str,
        weight_name_filter: Callable[[str], bool] | None = None,
        recapture_cuda_graph: bool = False,
    ) -> tuple[bool, str]:
        """Load weights on all ranks. If a rank cannot, all ranks load again what they loaded before.

        Returns:
            Whether all ranks have the new weights, and a message.

        Raises:
            ShiftError: parameters have changed, and the old weights cannot be loaded either.
        """
        if load_format.lower() not in FORMATS:
            return False, f"load_format {load_format!r} does not update weights; give one of {', '.join(FORMATS)}"
        self._shards_change()
        old_path, old_format = self.model_config.model_path, self.get_model_runner().load_config.load_format
        own, message = self._load(model_path, load_format, weight_name_filter)
        ranks = [int(loaded) for (loaded,) in from_all_ranks([own])]
        if min(ranks) == Loaded.NEW:
            if recapture_cuda_graph and self.device == "cuda":  # only now, because all ranks must capture together
                self.recapture_cuda_graph()
            return True, message
        if own is Loaded.NEW:
            failed = next(rank for rank, loaded in enumerate(ranks) if loaded != Loaded.NEW)
            message = f"rank {failed} could not load the weights of {model_path}; its log has the reason"
        if max(ranks) != Loaded.OLD:
            restored, why = self._load(old_path, old_format, weight_name_filter)
            if restored is not Loaded.NEW:
                raise ShiftError(f"{message}; restart, because the weights of {old_path} cannot be loaded again: {why}")
            message += f"; the weights of {old_path} were loaded again"
        self.model_config.model_path = old_path
        return False, message

    def _load(
        self, model_path: str, load_format: str, weight_name_filter: Callable[[str], bool] | None
    ) -> tuple[Loaded, str]:
        """Let SGLang load weights on this rank."""
        try:
            loaded, message = super().update_weights_from_disk(model_path, load_format, weight_name_filter)
        except Exception as error:  # SGLang's rollback reads the same path again, so it fails like the first time
            return Loaded.PARTLY, f"{PARTLY_LOADED} from {model_path}: {error}"
        if loaded:
            return Loaded.NEW, message
        return (Loaded.PARTLY if message.startswith(PARTLY_LOADED) else Loaded.OLD), message

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
