"""SGLang's prefix cache, which can also be read as a tree of pages and built again from one."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import create_unified_radix_cache, register_radix_cache_backend
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_shift.instances.prefix_tree import ROOT, CachedPage, PrefixTree, Space
from sglang_shift.seams import extends, overrides, relies_on

BACKEND = "sglang_shift_instances"
"""The name of this cache for ``--radix-cache-backend``."""

FEW_NAMES = 1024
"""So many names of namespaces may always be noted. Clients choose the names, so those of no slot are forgotten."""


@relies_on(
    "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.checkpoint_into_tree",
    "This method caches the tokens of a request. It calls insert for all of them.",
)
class InstanceCache(UnifiedRadixCache):
    """SGLang's cache. Its core gives the slots of all prefixes, but not their tokens, so this class notes them."""

    def __init__(self, params: Any) -> None:
        self.shift_space_names: dict[Space, int] = {}
        self.shift_most_names = FEW_NAMES
        super().__init__(params)
        allocator = params.token_to_kv_pool_allocator
        self.make_room(allocator.size + allocator.page_size)  # the highest level has the most

    def make_room(self, slots: int) -> None:
        """Note the tokens of so many slots. Nothing may be cached yet."""
        device = self.token_to_kv_pool_allocator.device
        self.shift_tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self.shift_spaces = torch.zeros(slots, dtype=torch.int64, device=device)

    @overrides("Our method notes which token is in which slot, because the core of the cache does not tell it.")
    def insert(self, params: InsertParams) -> Any:
        key, begin = params.key, params.prev_prefix_len
        if params.value is not None and (count := min(len(key), len(params.value)) - begin) > 0:
            slots = params.value[begin : begin + count]
            tokens = torch.frombuffer(key.raw_token_ids(), dtype=torch.int64)[begin : begin + count]
            self.shift_tokens[slots] = tokens.to(slots.device)
            self.shift_spaces[slots] = self.number_of_space((key.extra_key, key.cache_salt))
        return super().insert(params)

    def number_of_space(self, space: Space) -> int:
        """The number of a namespace, which may be a new one."""
        names = self.shift_space_names
        if space not in names and len(names) >= self.shift_most_names:
            self.forget_spaces()
        return names.setdefault(space, len(names))

    def forget_spaces(self) -> None:
        """Forget the names of which no slot is, and number the others again."""
        used = torch.bincount(self.shift_spaces, minlength=len(self.shift_space_names)) > 0
        self.shift_spaces = (used.cumsum(0) - 1)[self.shift_spaces]
        kept = [name for name, keep in zip(self.shift_space_names, used.tolist(), strict=False) if keep]
        self.shift_space_names.clear()
        self.shift_space_names.update({name: number for number, name in enumerate(kept)})
        self.shift_most_names = max(FEW_NAMES, 2 * len(kept))  # so most requests need not look through all slots

    @overrides("Our method also forgets the names of namespaces, of which nothing is cached any more.")
    def reset(self) -> None:
        super().reset()
        self.shift_space_names.clear()

    @relies_on(
        "sglang.srt.mem_cache.unified_cache.unified_tree_core:UnifiedTreeCore.walk_for_kv_canary",
        "This method gives each cached slot, and the slot of the token before it.",
    )
    def read(self) -> PrefixTree:
        """All cached prefixes. Ranks with the same cache get the same tree."""
        walk, size = self.tree_core.walk_for_kv_canary(False, False), self.page_size
        slots = torch.as_tensor(walk.slot_indices).cpu()
        parents = torch.as_tensor(walk.prev_slot_indices).cpu()[::size] // size
        names = list(self.shift_space_names)
        tokens = self.shift_tokens.cpu()[slots].view(-1, size).tolist()
        spaces = self.shift_spaces.cpu()[slots[::size]].tolist()
        return PrefixTree(
            CachedPage(page, max(parent, ROOT), tuple(of_page), names[space])
            for page, parent, of_page, space in zip(
                (slots[::size] // size).tolist(), parents.tolist(), tokens, spaces, strict=True
            )
        )

    def write(self, tree: PrefixTree) -> None:
        """Cache the prefixes of a tree, and nothing else. Ranks with the same tree get the same cache.

        The allocator must count the pages of the tree as taken afterwards.

        Raises:
            RuntimeError: SGLang has cached another number of tokens.
        """
        self.reset()
        size = self.page_size
        tokens, slots = array("q"), array("q")  # of one branch after the other
        for branch in tree.branches():
            shared = branch.shared * size
            del tokens[shared:], slots[shared:]
            for page in branch.pages:
                tokens.extend(page.tokens)
                slots.extend(range(page.number * size, (page.number + 1) * size))
            extra_key, cache_salt = branch.pages[-1].space
            key = RadixKey(tokens[:], extra_key, cache_salt=cache_salt)
            value = torch.frombuffer(slots[:], dtype=torch.int64).to(self.device)
            # What is cached already must not be noted, and not be freed as a second copy.
            self.insert(InsertParams(key=key, value=value, prev_prefix_len=shared, inserted_len=shared))
        if (cached := self.evictable_size()) != len(tree) * self.page_size:
            raise RuntimeError(
                f"the cache holds {cached} tokens after a change of level, and not those of {len(tree)} pages"
            )

    def regroup(self, group: Any) -> None:
        """Use the groups of another level.

        Args:
            group: The group of the ranks of the instance.
        """
        self.tp_group = self.attn_tp_group = group.cpu_group
        self.tp_world_size = group.world_size


@extends(
    "sglang.srt.mem_cache.registry:register_radix_cache_backend", "SGLang makes the cache of the name that is given."
)
def make_cache(context: Any) -> Any:
    """Make the cache of a rank that can be in several instances."""
    return create_unified_radix_cache(context, cache_class=InstanceCache)


register_radix_cache_backend(BACKEND, make_cache)
