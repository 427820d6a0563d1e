"""New weights from disk: what does not load leaves the weights as they were, on all ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.model_executor.model_runner_components import weight_updater as stock
from sglang.srt.model_loader import loader
from sglang_shift.errors import ShiftError
from sglang_shift.runtime import weight_updater
from sglang_shift.runtime.weight_updater import Loaded, ShiftWeightUpdater


class Model(torch.nn.Module):
    """Two parameters, which it loads as SGLang's models do: one after the other, each with its shape."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(torch.zeros(2), requires_grad=False) for _ in range(2))

    def load_weights(self, weights):
        for name, weight in weights:
            param = self.get_parameter(name)
            if param.shape != weight.shape:
                raise ValueError(f"{name} has another shape")
            param.copy_(weight)

    @property
    def values(self):
        return [*self.first.tolist(), *self.second.tolist()]


def save(folder, value, shape=2):
    folder.mkdir()
    save_file({"first": torch.full((2,), value), "second": torch.full((shape,), value)}, folder / "model.safetensors")
    return str(folder)


@pytest.fixture
def rank(monkeypatch, tmp_path):
    """The updater of a rank that serves a checkpoint of ones, and what the other rank says of its own loads."""
    settings = SimpleNamespace(
        weight_cache_mode="off", model_checksum=None, weight_loader_disable_mmap=False,
        weight_loader_prefetch_checkpoints=False, weight_loader_prefetch_num_threads=1,
        weight_loader_drop_cache_after_load=False,
    )  # fmt: skip
    monkeypatch.setattr(loader, "get_model", lambda: settings)
    monkeypatch.setattr(loader, "get_server_args", lambda: settings)
    monkeypatch.setattr(stock, "get_model", lambda: settings)
    monkeypatch.setattr(stock, "get_pp_stage_load_group", lambda: None)
    other = []
    monkeypatch.setattr(weight_updater, "from_all_ranks", lambda own: [own, [other.pop()] if other else own])
    model, captures = Model(), []
    old = save(tmp_path / "old", 1.0)
    model.load_weights([("first", torch.ones(2)), ("second", torch.ones(2))])
    config = SimpleNamespace(
        model_path=old, dtype=torch.float32, revision=None, quantization=None, hf_config=SimpleNamespace()
    )
    runner = SimpleNamespace(
        base_weights=SimpleNamespace(stale=False), load_config=SimpleNamespace(load_format=LoadFormat.AUTO)
    )
    updater = ShiftWeightUpdater(
        tp_rank=0, device="cpu", gpu_id=0, model_config=config, custom_weight_loaders={}, get_model=lambda: model,
        update_model_fields=lambda *_, **__: None, recapture_cuda_graph=lambda: captures.append(1),
        get_model_runner=lambda: runner,
    )  # fmt: skip
    return SimpleNamespace(updater=updater, model=model, config=config, runner=runner, old=old, other=other)


def test_new_weights(rank, tmp_path):
    new = save(tmp_path / "new", 2.0)
    assert rank.updater.update_weights_from_disk(new, "auto")[0]
    assert rank.model.values == [2.0] * 4 and rank.config.model_path == new and rank.runner.base_weights.stale


@pytest.mark.parametrize("bad", ["reshaped", "truncated"])
def test_a_checkpoint_that_does_not_load(rank, tmp_path, bad):
    """SGLang's own rollback reads the same checkpoint again, and its second error ended the rank."""
    new = save(tmp_path / "new", 2.0, shape=3 if bad == "reshaped" else 2)
    if bad == "truncated":
        file = tmp_path / "new" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
    done, message = rank.updater.update_weights_from_disk(new, "auto")
    assert not done and message.endswith(f"; the weights of {rank.old} were loaded again"), message
    assert rank.model.values == [1.0] * 4 and rank.config.model_path == rank.old and rank.runner.base_weights.stale


def test_a_folder_without_a_checkpoint(rank, tmp_path):
    """Nothing was written, so nothing is loaded again: the old checkpoint may be gone."""
    (tmp_path / "old" / "model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    done, message = rank.updater.update_weights_from_disk(str(tmp_path / "empty"), "auto")
    assert not done and "Cannot find any model weights" in message and "loaded again" not in message
    assert rank.model.values == [1.0] * 4 and rank.config.model_path == rank.old


@pytest.mark.parametrize("other", [Loaded.OLD, Loaded.PARTLY])
def test_another_rank_fails(rank, tmp_path, other):
    rank.other.append(other)
    new = save(tmp_path / "new", 2.0)
    done, message = rank.updater.update_weights_from_disk(new, "auto")
    assert not done and message.startswith(f"rank 1 could not load the weights of {new}; its log has the reason")
    assert rank.model.values == [1.0] * 4 and rank.config.model_path == rank.old


def test_another_rank_has_new_weights(rank, tmp_path):
    """It loads the old ones again, and this rank does as well: some formats are read by all ranks together."""
    rank.other.append(Loaded.NEW)
    (tmp_path / "empty").mkdir()
    done, message = rank.updater.update_weights_from_disk(str(tmp_path / "empty"), "auto")
    assert not done and message.endswith("were loaded again")


def test_the_old_weights_do_not_load_either(rank, tmp_path):
    (tmp_path / "old" / "model.safetensors").unlink()
    new = save(tmp_path / "new", 2.0, shape=3)
    with pytest.raises(ShiftError, match=f"second has another shape; restart, because the weights of {rank.old} "):
        rank.updater.update_weights_from_disk(new, "auto")


@pytest.mark.parametrize("load_format", ["private", "flash_rl", "Dummy", "gguf", "x"])
def test_formats_that_do_not_update_weights(rank, tmp_path, load_format):
    done, message = rank.updater.update_weights_from_disk(save(tmp_path / "new", 2.0), load_format)
    assert not done and message.startswith(f"load_format '{load_format}' does not update weights; give one of auto, pt")
    assert rank.config.quantization is None and not rank.runner.base_weights.stale


def test_formats_that_update_weights_have_the_right_loader():
    for load_format in LoadFormat:
        if load_format in weight_updater.FORMATS:
            made = loader.get_model_loader(loader.LoadConfig(load_format=load_format))
            assert isinstance(made, loader.DefaultModelLoader)


@pytest.mark.parametrize("failing", [False, True])
def test_graphs_are_captured_when_all_ranks_have_the_weights(monkeypatch, rank, failing):
    captured = []
    monkeypatch.setattr(ShiftWeightUpdater, "_load", lambda *_: (Loaded.NEW, "done"))
    values = {name: getattr(rank.updater, name) for name in rank.updater.__dataclass_fields__}
    updater = ShiftWeightUpdater(**{**values, "device": "cuda", "recapture_cuda_graph": lambda: captured.append(1)})
    rank.other.extend([Loaded.PARTLY] if failing else [])
    assert updater.update_weights_from_disk("new", "auto", None, True)[0] is not failing
    assert captured == ([] if failing else [1])
