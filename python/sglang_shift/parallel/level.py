"""The groups of each level, and the switch of this rank from one level to another.

SGLang reads the size of tensor parallelism, this rank's place in it and its group from one object, ``get_parallel()``.
So a rank is at a level when this object has the values of the level. What has copied a group before must be made again:
:mod:`sglang_shift.runtime.level_switch` does so.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.runtime_context import get_parallel

from sglang_shift.errors import InstanceRefused
from sglang_shift.instances.levels import Instance, Levels
from sglang_shift.parallel.exchange.collective import CollectiveExchange
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.parallel.topology import Topology, new_group
from sglang_shift.seams import relies_on

TENSOR_PARALLEL = ("tp", "attn_tp", "moe_tp")
"""The kinds of tensor parallelism whose groups are the ranks of an instance. All of them have the same ranks here."""

OTHER_SIZES = ("pp_size", "attn_dp_size", "attn_cp_size", "moe_ep_size", "moe_dp_size", "dcp_size")
"""The sizes of SGLang's other kinds of parallelism. Each of them must be 1."""


@dataclass(frozen=True)
class Level:
    """This rank's place at a level.

    Attributes:
        instance: The instance that this rank is a part of.
        rank: This rank in the world, 0 to P - 1.
        group: The group of the ranks of the instance.
        topology: How SP steps of the instance divide tokens. Its base-TP groups are those of the whole world.
    """

    instance: Instance
    rank: int
    group: GroupCoordinator
    topology: Topology

    @property
    def size(self) -> int:
        """The number of ranks of the instance."""
        return self.instance.level

    @property
    def place(self) -> int:
        """This rank's TP rank in the instance."""
        return self.instance.place(self.rank)

    @property
    def has_sp(self) -> bool:
        """Whether ranks of the instance can share the tokens of a step. If not, S is 1, and all steps run in TP."""
        return self.topology.layout.sp_size > 1

    @property
    def leads(self) -> bool:
        """Whether this rank gets the requests of the instance."""
        return self.rank == self.instance.leader

    @property
    def values(self) -> dict[str, Any]:
        """The values of this level in SGLang's parallel context."""
        parts = {"size": self.size, "rank": self.place, "group": self.group}
        return {f"{kind}_{part}": value for kind in TENSOR_PARALLEL for part, value in parts.items()}

    def scope(self) -> AbstractContextManager[Any]:
        """Inside of this context, SGLang builds what belongs to this level. Afterwards the rank is where it was."""
        scope: AbstractContextManager[Any] = get_parallel().override(**self.values)
        return scope

    @relies_on(
        "sglang.srt.runtime_context:ParallelContext.override_permanently",
        "This method changes the values that all readers of the parallel context get, and checks them.",
    )
    @relies_on(
        "sglang.srt.runtime_context:ParallelContext._read",
        "This method lets permanent values take precedence over the values that SGLang has published.",
    )
    def enter(self) -> None:
        """Make this rank a part of the instance, until another level is entered. No step may run meanwhile."""
        get_parallel().override_permanently(**self.values)


@relies_on(
    "sglang.srt.runtime_context:_validate_parallel",
    "This function says which sizes and groups of the parallel context must fit each other.",
)
def build_levels(levels: Levels, topology: Topology) -> dict[int, Level]:
    """Build the groups of all levels. All ranks of the world call it once, after SGLang has built its own groups.

    Args:
        levels: The levels that the world uses.
        topology: How SP steps of the whole world divide tokens. The level of the whole world uses it.

    Returns:
        This rank's place at each level. The group of the whole world is SGLang's own TP group. The t ranks that divide
        the base weights are the same at each level, so S is k / t in an instance of k ranks.

    Raises:
        InstanceRefused: SGLang also divides the work in another way than by tensor parallelism, or the smallest
            instances have less than t ranks, so that they have not all weights.
    """
    parallel = get_parallel()
    world: GroupCoordinator = parallel.tp_group
    _check_parallelism(world, levels, topology)
    places = {}
    for size in levels.sizes:
        instance = levels.instance_of(topology.rank, size)
        if size == levels.world_size:
            places[size] = Level(instance, topology.rank, world, topology)
        else:
            ranks = [list(each.ranks) for each in levels.instances(size)]
            group = new_group(ranks, world, f"shift_level_{size}", fast_all_reduce=None)
            places[size] = Level(instance, topology.rank, group, _topology(levels, instance, group, topology))
    return places


def _topology(levels: Levels, instance: Instance, group: GroupCoordinator, whole: Topology) -> Topology:
    """How SP steps of an instance divide tokens. All ranks of the world call it at the same point."""
    width = whole.layout.base_tp_size
    layout = RankLayout(instance.level, instance.level // width)
    sp_group = group
    if width > 1:
        leaders = [each.leader for each in levels.instances(instance.level)]
        ranks = [[leader + rank for rank in members] for leader in leaders for members in layout.sp_groups()]
        sp_group = new_group(ranks, get_parallel().tp_group, f"shift_sp_{instance.level}", fast_all_reduce=False)
    return Topology(layout, instance.place(whole.rank), sp_group, whole.base_tp_group, CollectiveExchange(sp_group))


def _check_parallelism(world: GroupCoordinator, levels: Levels, topology: Topology) -> None:
    if world.world_size != levels.world_size:
        raise ValueError(f"the levels are those of {levels.world_size} ranks, but SGLang has {world.world_size}")
    if levels.lowest % (width := topology.layout.base_tp_size):
        raise InstanceRefused(
            f"with --sp-size {topology.layout.sp_size}, {width} ranks hold the weights together, but an instance of "
            f"{levels.lowest} must hold all of them; give fewer --instances, or a larger --sp-size"
        )
    for name in OTHER_SIZES:
        if (size := getattr(get_parallel(), name)) != 1:
            raise InstanceRefused(f"instances work with tensor parallelism only, but {name} is {size}; set it to 1")
