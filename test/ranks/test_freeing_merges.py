"""Two schedulers that free weights when they merge: requests use the memory, and get the tokens of stock TP=1."""

from __future__ import annotations

from typing import Any

import pytest
from families import WIDE, Family, make_model
from instance_trial import prompt, started, tokens_of_stock

CAPACITY = 255  # tokens of one of two replicas
FLAGS = ("--max-total-tokens", "511", "--merge-weights", "free", "--disable-overlap-schedule")
STREAMS = {f"q{n}": (prompt(n, 20 + 7 * n), 60 + n) for n in range(4)}
LONG = (prompt(20, 1400), 40)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("model"))
    make_model(folder, Family("LlamaConfig", [], WIDE))
    return folder


@pytest.fixture(scope="module")
def alone(model):
    """The tokens of each request, one after the other on stock SGLang."""
    return tokens_of_stock(("--model-path", model, "--max-total-tokens", "2047"), {**STREAMS, "long": LONG})


@pytest.fixture(scope="module")
def world(model):
    with started(2, ("--model-path", model, *FLAGS), instances=2) as started_world:
        yield started_world


@pytest.fixture(autouse=True)
def idle(world):
    """Each test begins with replicas that hold nothing, and ends without leaks."""
    yield
    world.renew()


def memory(scheduler: Any) -> tuple[int, int]:
    """The pages of this rank, and the memory that the system counts for them."""
    device = scheduler.shift_switch.pages.device
    return device.count, device.resident_bytes


def weights(scheduler: Any) -> list[tuple[str, int, str]]:
    """The name, the address and a digest of each base weight that this rank has whole."""
    import hashlib

    bases = scheduler.shift_switch.weights.bases
    return [
        (name, base.weight.data_ptr(), hashlib.sha256(base.weight.contiguous().numpy()).hexdigest())
        for name, base in bases.items()
        if base.complete
    ]


def capacity(scheduler: Any) -> tuple[int, int, int]:
    """What the scheduler and the allocator count, and how many tokens the memory has room for, buffer by buffer."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    mapped = [len(each.mapped) for each in scheduler.shift_switch.pages.tail._ranges]
    row = pool.row_dim * 4
    first_page = 4 * 64 * 4  # the slot that holds no token has the memory of a token at level 1
    return (
        scheduler.max_total_num_tokens,
        scheduler.token_to_kv_pool_allocator.size,
        min(((pages << 21) - first_page) // row for pages in mapped),
    )


def modes(scheduler: Any) -> dict[str, int]:
    return dict(scheduler.shift_selector.counters()["steps"])


def test_a_merged_instance_uses_the_memory_of_weights(world, alone):
    """A request that two pooled replicas could not hold is served, and the next requests are after it in the cache."""
    before = world.call(memory), world.call(weights)
    replicas = world.call(capacity)
    assert [each[:2] for each in replicas] == [(CAPACITY, CAPACITY)] * 2
    for number, rid in enumerate(("q0", "q1")):
        world.submit(number, rid, *STREAMS[rid])
    world.wait_tokens({"q0": 5, "q1": 5})
    steps = world.call(modes)
    merged = world.merge()
    assert merged.tokens_recomputed == merged.tokens_dropped == 0
    assert merged.phases["weights"] > 0
    assert world.call(memory) == before[0], "memory has moved, and none was taken"
    for total, size, room in world.call(capacity):
        assert total == size == room > len(LONG[0]) > 2 * CAPACITY, "all memory that is mapped is used"
    world.submit(0, "long", *LONG)
    world.wait_tokens({"long": 1})
    for rid in ("q2", "q3"):
        world.submit(0, rid, *STREAMS[rid])
    world.wait_tokens({"q2": 5, "q3": 5})
    assert min(world.call(last_used_slot)) > 2 * CAPACITY, "tokens are in the memory of weights"
    freed = world.call(weights)
    assert len(freed[0]) < len(before[1][0]), "FFN weights are not whole"
    world.wait_end(["long"])
    after = world.call(modes)
    assert after[0]["sp"] == steps[0]["sp"] and after[0]["tp"] > steps[0]["tp"], "all steps ran in TP"
    back = world.split()
    assert back.tokens_recomputed == 0 and back.phases["weights"] > 0
    assert world.wait_end() == alone
    assert (world.call(memory), world.call(weights)) == before, "each bit is back, at its address"
    assert [each[:2] for each in world.call(capacity)] == [(CAPACITY, CAPACITY)] * 2


def last_used_slot(scheduler: Any) -> int:
    """The highest slot that the allocator has given away."""
    allocator = scheduler.token_to_kv_pool_allocator
    used = set(range(1, allocator.size + 1)) - set(allocator.get_all_free_pages().tolist())
    return max(used, default=0)


def test_a_split_waits_until_the_requests_fit(world, alone):
    world.merge()
    held = {f"s{n}": prompt(40 + n, 180) for n in range(4)}
    for rid, ids in held.items():
        world.submit(0, rid, ids, 60)
    world.wait_tokens(dict.fromkeys(held, 3))
    before = world.call(memory)
    refused = world.change(0, 2, 1)
    assert not refused.ok and "the parts have no room for" in refused.reason
    assert world.call(memory) == before
    world.submit(0, "q1", *STREAMS["q1"])
    assert world.wait_end(["q1"]) == {"q1": alone["q1"]}
    world.wait_end()
    world.split()


def test_a_merge_that_is_given_up_frees_nothing(world, alone):
    world.submit(1, "masks", prompt(50, 20), 40, return_sampling_mask=True)
    world.submit(0, "q0", *STREAMS["q0"])
    world.wait_tokens({"masks": 3, "q0": 3})
    before = world.call(weights)
    refused = world.change(0, 2, 2)
    assert not refused.ok and "masks" in refused.reason
    assert world.call(weights) == before
    assert world.wait_end(["q0"]) == {"q0": alone["q0"]}


def test_new_weights_of_the_merged_ranks_reach_the_replicas(world):
    """SGLang writes the shards of the merged ranks. After the split, each replica has all of them."""
    world.merge()
    world.call(double_shards)
    world.split()
    left, right = world.call(ffn_sums)
    assert left == right
    world.merge()
    world.call(halve_shards)
    world.split()
    assert world.call(ffn_sums) == [[value / 2 for value in left]] * 2


def double_shards(scheduler: Any) -> None:
    scale_shards(scheduler, 2)


def halve_shards(scheduler: Any) -> None:
    scale_shards(scheduler, 0.5)


def scale_shards(scheduler: Any, factor: float) -> None:
    switch = scheduler.shift_switch
    for module in switch.weights.bases.values():
        module.linear.weight.data.mul_(factor)
    switch.runner.base_weights.stale = True


def ffn_sums(scheduler: Any) -> list[float]:
    bases = scheduler.shift_switch.weights.bases
    return [float(base.weight.abs().double().sum()) for base in bases.values()]
