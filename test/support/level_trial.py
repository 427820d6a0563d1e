"""Runs the steps of a trial at several levels, in the ranks of ``model_trial``.

All instances of a level run the same requests, so all ranks of the world must compute the same logits.
"""

from __future__ import annotations

from typing import Any

import torch
from model_trial import run_pattern, storage_bytes
from trial_script import PATTERNS

# The level of each step of the walk, as exponents of 2, up to the highest level. It has every pair of levels.
WALK = (0, 1, 2, 1, 0, 2, 0, 1, 2)
WALK_MODES = "tstststts"  # at the lowest level there is only TP


def run(runner: Any, levels: tuple[int, ...], patterns: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], str, int]:
    """Run the patterns at each level, and ``walk``, which changes the level between steps.

    Returns:
        The logits by level and pattern (``2 sp``), the class of the model, and the memory of the weights of all levels.
    """
    from sglang_shift.instances.levels import Levels
    from sglang_shift.runtime.level_switch import LevelSwitch

    switch = LevelSwitch(runner, Levels(levels))
    logits = {}
    for level in (*levels, levels[0]):  # the lowest level again, after all others
        switch.enter(level)
        check_groups(runner, switch)
        for name in patterns if switch.place.has_sp else ("tp",):
            logits[f"{level} {name}"] = run_pattern(runner, PATTERNS[name], stock=False)
    logits["walk"] = walk(switch)
    skins = switch.skins.values()
    tensors = [p for skin in skins for p in skin.model.parameters()]
    bases = [base for skin in skins if skin.sp_model for base in skin.sp_model.weights.bases.values()]
    tensors += [tensor for base in bases for tensor in base.tensors()]
    assert storage_bytes(tensors) == switch.weights.bytes
    assert not any(tensor.is_meta for tensor in tensors)
    return logits, type(runner.model).__name__, storage_bytes(tensors)


def walk(switch: Any) -> torch.Tensor:
    """Run all steps, each at another level, and move the requests and their KV cache before each step."""
    sizes = switch.levels.sizes

    def change_level(number: int, batch: Any) -> None:
        level = sizes[min(WALK[number], len(sizes) - 1)]
        if batch is None:
            switch.enter(level)
        elif level > switch.level:
            merge(switch, level)
        elif level < switch.level:
            split(switch, level)

    return run_pattern(switch.runner, WALK_MODES, stock=False, before_step=change_level)


def held_slots(runner: Any) -> torch.Tensor:
    """The slots of all tokens of all requests: those that the allocator has given away. The pages have one token."""
    pool = runner.token_to_kv_pool
    free = torch.zeros(pool.size + 1, dtype=torch.bool)
    free[runner.token_to_kv_pool_allocator.get_all_free_pages()] = True
    free[0] = True
    return (~free).nonzero().flatten()


def rename_slots(runner: Any, old: torch.Tensor, new: torch.Tensor) -> None:
    """Let all requests have ``new`` slots in place of ``old`` ones."""
    table = runner.req_to_token_pool.req_to_token
    names = torch.zeros(int(max(table.max(), old.max())) + 1, dtype=table.dtype)
    names[old] = new.to(table.dtype)
    table.copy_(names[table.long()])


def merge(switch: Any, level: int) -> None:
    """Merge instances, and continue the requests of the last of them. The others have the same ones."""
    import torch.distributed as dist
    from sglang_shift.kv.layout import merged_pages

    table, factor = switch.runner.req_to_token_pool.req_to_token, level // switch.level
    everyone: list[Any] = [None] * level
    mine = (held_slots(switch.runner), table)
    dist.all_gather_object(everyone, mine, group=switch.places[level].group.cpu_group)
    parts = everyone[:: switch.level]
    volume = switch.merge(level, [slots for slots, _ in parts])
    assert volume.sent_bytes > 0
    slots = parts[-1][0]
    table.copy_(parts[-1][1])  # the instances may have put the same token into different slots
    new_slots = merged_pages(slots, factor - 1, factor)
    rename_slots(switch.runner, slots, new_slots)
    switch.pool.keep(new_slots)
    check_groups(switch.runner, switch)


def split(switch: Any, level: int) -> None:
    """Split an instance. Each part continues all requests, so each gets a copy of their KV cache at its home."""
    from sglang_shift.kv.layout import home_of

    slots, factor = held_slots(switch.runner), switch.level // level
    part = switch.place.place // level
    free = switch.runner.token_to_kv_pool_allocator.get_all_free_pages()
    kept = []
    for number in range(factor):
        away = home_of(slots, factor)[0] != number
        target = slots.clone()
        target[away] = free[home_of(free, factor)[0] == number][: int(away.sum())]
        for buffer in (*switch.pool.pool.k_buffer, *switch.pool.pool.v_buffer):
            buffer[target[away]] = buffer[slots[away]]
        kept.append(home_of(target, factor)[1])
    switch.split(level, kept)
    rename_slots(switch.runner, slots, kept[part])
    switch.pool.keep(kept[part])
    check_groups(switch.runner, switch)


def check_groups(runner: Any, switch: Any) -> None:
    """Check that nothing that the runner can reach has the groups of another level.

    The model that SGLang has loaded stays, with its own groups, because it holds the weights. It must not be in use.
    """
    skin = switch.skins[switch.level]
    assert runner.model is skin.model and (skin.sp_model is None or runner.sp_model is skin.sp_model)
    whole = switch.weights
    kept = (whole.model, whole.sp_model, whole.sp_model.weights) if switch.level < switch.levels.world_size else ()
    stale = {}
    for size, place in switch.places.items():
        if size != switch.level:
            for each in (place.group, place.topology.sp_group):
                for group in (each, each.device_group, each.cpu_group):
                    stale[id(group)] = f"a group of level {size}"
    found = list(reachable(runner, stale, {id(each) for each in kept}))
    assert not found, f"at level {switch.level}: {found}"


def reachable(root: Any, targets: dict[int, str], seen: set[int]) -> Any:
    """Yield the paths from an object to the targets, through attributes and containers of SGLang and this package.

    They do not go through the objects of ``seen``.
    """
    stack = [(root, type(root).__name__)]
    while stack:
        value, path = stack.pop()
        if id(value) in targets:
            yield f"{path} is {targets[id(value)]}"
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            stack += [(each, f"{path}[{key!r}]") for key, each in value.items()]
        elif isinstance(value, list | tuple | set):
            stack += [(each, f"{path}[{number}]") for number, each in enumerate(value)]
        elif type(value).__module__.startswith(("sglang", "torch.nn")):
            slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
            names = {name: getattr(value, name, None) for name in slots} | getattr(value, "__dict__", {})
            stack += [(each, f"{path}.{name}") for name, each in names.items()]
