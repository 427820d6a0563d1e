"""Switches a rank between levels: parallel context, model, KV cache, and what has copied a group of the level before.

The schedulers of instances call it between two steps, when no request is in a batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sglang.srt.model_loader.loader import _initialize_model
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.runtime_context import get_lora, get_observability, get_parallel

from sglang_shift.errors import InstanceRefused
from sglang_shift.instances.levels import Levels
from sglang_shift.kv.exchange import Volume
from sglang_shift.kv.pool import LevelPool
from sglang_shift.layers.skins import Skin, WholeWeights
from sglang_shift.parallel.exchange.choose import Operands, make_exchange
from sglang_shift.parallel.level import Level, build_levels
from sglang_shift.resolution import shift_config_of
from sglang_shift.runtime.level_execution import Execution, captures_graphs, settings_at
from sglang_shift.runtime.model_runner import ShiftModelRunner, most_tokens
from sglang_shift.runtime.moving_pages import MovingPages, device_of
from sglang_shift.seams import relies_on


class LevelSwitch:
    """The levels of one rank.

    To build it is a collective: all ranks of the world do so, after the KV cache was allocated. The rank is at the
    highest level then, which is the level of a server without instances.

    Args:
        runner: Our model runner, with its KV pool.
        levels: The levels of the world.
        frees: Whether merged instances free the FFN weights of other ranks, for more KV cache.

    Attributes:
        places: This rank's place at each level.
        weights: The weights that all levels share.
        skins: The model at each level.
        executions: The attention backends and the CUDA graphs of each level.
        pool: The KV cache.
        pages: The pages that weights and KV cache share if merged instances free weights; else None.

    Raises:
        InstanceRefused: the model, the cache or the settings cannot be shared by instances.
    """

    def __init__(self, runner: ShiftModelRunner, levels: Levels, *, frees: bool = False) -> None:
        _check(runner)
        self.runner, self.levels = runner, levels
        kv_heads = runner.model_config.get_total_num_kv_heads()
        self.pool = LevelPool(runner.token_to_kv_pool, runner.token_to_kv_pool_allocator, levels, kv_heads)
        self.places = build_levels(levels, runner.topology)
        self.weights = WholeWeights(runner.model, runner.sp_model, runner.topology)
        self.pages: MovingPages | None = None
        if frees:
            bases = [base for name, base in self.weights.bases.items() if name in self.weights.structure.linears]
            self.pages = MovingPages(device_of(runner.device), bases, self.pool, self.places, levels)
        self.skins = {size: self._skin(place) for size, place in self.places.items()}
        for size in levels.sizes:
            self.places[size] = self._with_exchange(size)
        self.executions: dict[int, Execution] = {}
        for size in levels.sizes:
            self.enter(size)
            self.executions[size] = self._execution()

    @property
    def level(self) -> int:
        """The level of this rank now."""
        return self.pool.level

    @property
    def place(self) -> Level:
        """This rank's place at its level."""
        return self.places[self.level]

    @property
    def tp_only(self) -> bool:
        """Whether this rank lacks weights that SP steps need."""
        return self.pages is not None and self.level > self.levels.lowest

    def merge(self, level: int, pages: list[torch.Tensor]) -> Volume:
        """Merge into an instance of a higher level, and keep the pages of all that merge.

        All ranks of the new instance call it, between two steps. Then they call :meth:`move_pages`.

        Args:
            level: The higher level.
            pages: For each instance that merges, the pages of the KV cache that hold tokens, by their numbers now, on
                the CPU. They are equal on all ranks. ``merged_pages`` of :mod:`sglang_shift.kv.layout` gives their
                numbers afterwards. All pages are free: call :meth:`LevelPool.keep` with those that are not.
        """
        volume = self.pool.merge(self.places[level], pages)
        self._install()
        return volume

    def split(self, level: int, pages: list[torch.Tensor]) -> Volume:
        """Split into instances of a lower level. All ranks of the instance call it, between two steps.

        Then they call :meth:`move_pages`.

        Args:
            level: The lower level.
            pages: For each part, the pages of the KV cache that it keeps, by their numbers at the lower level, on the
                CPU. They are equal on all ranks. All pages are free: call :meth:`LevelPool.keep` with those that are
                not.
        """
        volume = self.pool.split(self.place, level, pages)
        self._install()
        return volume

    def enter(self, level: int) -> None:
        """Go to a level with an empty KV cache. All ranks of the world call it, between two steps."""
        self.levels.check(level)
        self.pool.enter(level)
        self._install()
        self.move_pages()

    def move_pages(self) -> int:
        """Move memory between weights and KV cache, if instances do, as the new level needs it.

        Returns:
            The bytes of weights that this rank has sent.
        """
        return self.pages.enter(self.level) if self.pages is not None else 0

    @relies_on(
        "sglang.srt.layers.sampler:Sampler.__init__",
        "This method copies the group over which ranks agree on the tokens they sampled.",
    )
    def _install(self) -> None:
        """Let the runner take its next step at the level of the KV cache."""
        runner, skin = self.runner, self.skins[self.level]
        if runner.base_weights.stale:
            runner.base_weights.refresh()
        self.place.enter()
        runner.model, runner.forwards, runner.topology = skin.model, skin.forwards, self.place.topology
        runner.sp_model = skin.sp_model or self.weights.sp_model  # at a level without SP, no step runs it
        if skin.sp_model is not None:
            runner.exchange_volume = skin.sp_model.exchange_volume(runner.topology.exchange, runner.dtype)
        if (execution := self.executions.get(self.level)) is not None:
            execution.install(runner)
        runner.sampler.tp_sync_group = self.place.group.device_group
        runner.max_total_num_tokens = self.pool.size

    def _skin(self, place: Level) -> Skin:
        return self.weights.skin(place, self._make_model, pools=not self.runner.is_generation)

    @relies_on(
        "sglang.srt.model_loader.loader:_initialize_model",
        "This function builds a model from its configuration and the parallel context, and loads no weights.",
    )
    def _make_model(self) -> torch.nn.Module:
        """Let SGLang build the model of the level that the parallel context has now, without memory."""
        runner: Any = self.runner
        with set_default_torch_dtype(runner.dtype), torch.device("meta"):
            model: torch.nn.Module = _initialize_model(runner.model_config, runner.load_config, None)
        return model

    def _execution(self) -> Execution:
        """Build the attention backends and the graphs of the level that this rank is at. Collective."""
        runner, config = self.runner, shift_config_of(self.runner.server_args)
        assert config is not None
        if self.level < self.levels.world_size or captures_graphs(runner):
            return Execution.build(runner, settings_at(config, self.place, self.tp_only))
        return Execution.of(runner)  # those of the runner, which has no graphs

    def _with_exchange(self, size: int) -> Level:
        """The place of this rank at a level, with the exchange that the settings ask for. Collective."""
        place, sp_model = self.places[size], self.skins[size].sp_model
        if sp_model is None or size == self.levels.world_size:
            return place  # without SP nothing is exchanged, and the whole world has its exchange already
        config = shift_config_of(self.runner.server_args)
        assert config is not None
        ranks = place.topology.layout.sp_size
        operands = Operands(most_tokens(), ranks * max(sp_model.exchange_columns), self.runner.dtype)
        exchange = make_exchange(config, place.topology.sp_group, self.runner.device, get_parallel().nnodes, operands)
        return replace(place, topology=replace(place.topology, exchange=exchange))


def _check(runner: ShiftModelRunner) -> None:
    """Refuse what has copied groups or shapes of one level and cannot be switched yet."""
    if captures_graphs(runner) and get_observability().forward_hooks:
        # SGLang would register those of the largest instance twice.
        raise InstanceRefused("instances with CUDA graphs cannot have forward hooks; leave out --forward-hooks")
    if get_lora().enable_lora:
        raise InstanceRefused(
            "instances cannot share LoRA adapters, which have the shapes of one level; leave out --enable-lora"
        )
    if runner.server_args.speculative_algorithm is not None:
        raise InstanceRefused("instances cannot share a draft model; leave out --speculative-algorithm")
