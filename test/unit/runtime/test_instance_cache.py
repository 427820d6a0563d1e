"""The prefix cache of an instance, without ranks."""

from __future__ import annotations

from array import array

import pytest
import torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang_shift.runtime import instance_cache
from sglang_shift.runtime.instance_cache import InstanceCache

SLOTS = 64


@pytest.fixture
def cache(monkeypatch):
    monkeypatch.setattr(instance_cache, "FEW_NAMES", 8)
    allocator = TokenToKVPoolAllocator(SLOTS, torch.float32, "cpu", None, False)
    return InstanceCache(CacheInitParams(False, None, allocator, 1, tree_components=(ComponentType.FULL,)))


def insert(cache, salt, tokens):
    slots = cache.token_to_kv_pool_allocator.alloc(len(tokens))
    if slots is None:
        cache.evict(EvictParams(num_tokens=len(tokens)))
        slots = cache.token_to_kv_pool_allocator.alloc(len(tokens))
    cache.insert(InsertParams(key=RadixKey(array("q", tokens), "tenant", cache_salt=salt), value=slots))


def cached(cache):
    return sorted((page.space, page.tokens) for page in cache.read().pages.values())


def test_the_names_of_namespaces_do_not_grow_without_bound(cache):
    """Each request of a client may name another one."""
    longest, requests = 0, 20 * SLOTS
    for number in range(requests):
        insert(cache, f"salt {number}", [number, number + 1])
        longest = max(longest, len(cache.shift_space_names))
        if number % 50 == 0 or number == requests - 1:
            held = range(max(0, number - SLOTS // 2 + 1), number + 1)
            expected = [(("tenant", f"salt {n}"), (token,)) for n in held for token in (n, n + 1)]
            assert cached(cache) == sorted(expected)
    assert longest <= 2 * SLOTS


def test_names_that_are_in_use_are_kept(cache):
    for number in range(20):
        insert(cache, f"salt {number}", [7])
    assert list(cache.shift_space_names.values()) == list(range(20))
    before = cached(cache)
    cache.write(cache.read())
    assert cached(cache) == before
    cache.reset()
    assert not cache.shift_space_names
    for number in range(30, 50):
        insert(cache, f"salt {number}", [8])
    assert [space for space, _ in cached(cache)] == [("tenant", f"salt {n}") for n in range(30, 50)]
