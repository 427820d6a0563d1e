"""The exchange by groups of heads: the same numbers as the ordinary exchange, and the order of its messages."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import GlooGroup, run_ranks, topology_over_gloo
from sglang_shift.layers.linear import OutputProjection, QkvProjection
from sglang_shift.layers.pipelined import PipelinedAttention
from sglang_shift.models.heads import Heads
from sglang_shift.modes import Mode
from sglang_shift.parallel.exchange import gloo, pipeline
from sglang_shift.parallel.exchange.gloo import GlooExchange
from sglang_shift.parallel.exchange.head_groups import MAX_GROUPS, HeadGroups
from sglang_shift.parallel.exchange.pipeline import HeadPipeline
from sglang_shift.parallel.step import Step, run_step

HEADS = [Heads(2, 1), Heads(5, 1), Heads(8, 1), Heads(8, 2), Heads(6, 2)]
WIDTH, HIDDEN = 3, 11


@pytest.mark.parametrize("heads", HEADS)
def test_groups_divide_the_queries_of_each_kv_head(heads):
    groups = HeadGroups.of(heads, WIDTH)
    assert groups.count == min(MAX_GROUPS, heads.query // heads.kv)
    shares = [list(range(groups.sharing))[groups.share(group)] for group in range(groups.count)]
    assert [head for share in shares for head in share] == list(range(groups.sharing))
    assert min(map(len, shares)) >= max(map(len, shares)) - 1 >= 0 < min(map(len, shares))
    assert sum(groups.columns(group) for group in range(groups.count)) == WIDTH * heads.qkv


def my_group(world: int) -> Any:
    group = GlooGroup.mine([list(range(world))])
    group.device_group = group.group  # type: ignore[attr-defined]
    return group


def queries_of(group: int, groups: HeadGroups, rows: torch.Tensor) -> torch.Tensor:
    """The queries of a group, head by head: the plainest definition."""
    by_head = rows[:, : groups.query_columns].view(len(rows), -1, groups.width)
    mine = range(groups.sharing)[groups.share(group)]
    heads = [kv * groups.sharing + head for kv in range(groups.heads.kv) for head in mine]
    return torch.cat([by_head[:, head] for head in heads], 1)


def check_equal(rank: int, world: int, dtype: torch.dtype, part_bytes: int) -> None:
    gloo.PART_BYTES = part_bytes
    group = my_group(world)
    for heads in HEADS:
        groups = HeadGroups.of(heads, WIDTH)
        width = world * WIDTH * heads.qkv
        weights = torch.Generator().manual_seed(1)
        qkv = torch.randn(HIDDEN, width, generator=weights).to(dtype)
        o = torch.randn(world * groups.query_columns, HIDDEN, generator=weights).to(dtype)
        for local in (1, 3, 40):
            x = torch.randn(local, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(dtype)
            for in_parts in (True, False):
                piped = HeadPipeline(group, groups, in_parts=in_parts)
                check_one(GlooExchange(group), piped, x, qkv, o, exact=in_parts)


def check_one(
    ordinary: GlooExchange, piped: HeadPipeline, x: torch.Tensor, qkv: torch.Tensor, o: torch.Tensor, *, exact: bool
) -> None:
    """Compare them. Products of other numbers of rows are rounded in another way."""
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 0.02, "atol": 0.02 * HIDDEN**0.5}
    if x.dtype == torch.float32 and not exact:
        tolerance = {"rtol": 1e-5, "atol": 1e-4}
    equal = partial(torch.testing.assert_close, **tolerance)
    groups = piped.groups
    whole = ordinary.scatter_heads(x, lambda rows: rows @ qkv, qkv.shape[1])
    piped.scatter(x, lambda rows: rows @ qkv, qkv.shape[1])
    tokens = len(whole) - (len(x) > 1)  # the last rank's last row is padding
    outputs = []
    for group in range(groups.count):
        arrived = piped.arrived(group)
        mine = groups.width * groups.query_heads(group)
        equal(arrived[:, :mine], queries_of(group, groups, whole))
        rest = whole[:, groups.query_columns :] if group == 0 else whole[:, :0]
        equal(arrived[:, mine:], rest)  # keys and values travel with the first group
        outputs.append(arrived[:tokens, :mine] * 2)
        piped.send_back(group, outputs[-1])
    expected = ordinary.gather_heads(whole[:tokens, : groups.query_columns] * 2, lambda rows: rows @ o)
    equal(piped.gather(lambda rows: rows @ o), expected)


@pytest.mark.parametrize("part_bytes", [1, gloo.PART_BYTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_same_numbers_as_the_ordinary_exchange(world, dtype, part_bytes):
    run_ranks(world, check_equal, dtype, part_bytes)


class Base:
    """A base weight: ``[inputs, outputs]``."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, (self.inputs, self.outputs) = weight, weight.shape

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight

    def rows(self, x: torch.Tensor, *, with_bias: bool) -> torch.Tensor:
        return x @ self.weight


class Core:
    """Stands for SGLang's attention: causal attention of one request, and a KV cache. It records its calls."""

    def __init__(self, heads: Heads, events: list[tuple[str, int]]) -> None:
        self.tp_q_head_num, self.tp_k_head_num, self.head_dim = heads.query, heads.kv, 4
        self.events, self.cache = events, {}

    def __call__(self, q, k, v, batch, save_kv_cache=True):
        self.events.append(("attend", self.tp_q_head_num))
        if save_kv_cache:
            self.cache.update(k=k.clone(), v=v.clone())
        assert torch.equal(k, self.cache["k"]) and torch.equal(v, self.cache["v"]), "every group has the new keys"
        query, key, value = (x.view(len(q), -1, self.head_dim).transpose(0, 1) for x in (q, *self.cache.values()))
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(query, key, value, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)


class Attention(torch.nn.Module):
    """Has the shape of SGLang's attention modules. Its rotation depends on the position."""

    def __init__(self, core: Core, qkv: Any, output: Any) -> None:
        super().__init__()
        self.core, self.qkv, self.output = core, qkv, output

    def rotary_emb(self, positions, query, key):
        return query * positions.unsqueeze(1).cos(), key * positions.unsqueeze(1).sin()

    def forward(self, positions, hidden_states, forward_batch):
        heads = Heads(self.core.tp_q_head_num, self.core.tp_k_head_num)
        rows, _ = self.qkv(hidden_states)
        q, k, v = rows.split([n * self.core.head_dim for n in (heads.query, heads.kv, heads.kv)], -1)
        q, k = self.rotary_emb(positions, q, k)
        return self.output(self.core(q, k, v, forward_batch))[0]


class RecordedBlocks(pipeline._Blocks):
    """Writes down when messages of so many columns start, and when they are waited for."""

    events: list[tuple[str, int]] = []  # noqa: RUF012

    def start(self, rows):
        self.events.append(("send", self.sent.shape[2]))
        super().start(rows)

    def wait(self, part):
        self.events.append(("wait", self.sent.shape[2]))
        super().wait(part)


def check_layer(rank: int, world: int, sp: int, heads: Heads, tokens: int) -> None:
    topology = topology_over_gloo(rank, world, sp)
    topology.sp_group.device_group = topology.sp_group.group
    pipeline._Blocks = RecordedBlocks  # type: ignore[misc]
    events = RecordedBlocks.events
    generator = torch.Generator().manual_seed(topology.layout.base_tp_index(rank))
    linear = SimpleNamespace(input_is_parallel=True, skip_bias_add=False, bias=None)
    qkv = QkvProjection(linear, Base(torch.randn(HIDDEN, sp * 4 * heads.qkv, generator=generator)))
    output = OutputProjection(linear, Base(torch.randn(sp * 4 * heads.query, HIDDEN, generator=generator)))
    core = Core(heads, events)
    attention = Attention(core, qkv, output)
    piped = PipelinedAttention(attention, core, qkv, output, qk_norm=False)
    whole = torch.randn(-(-tokens // sp) * sp, HIDDEN, generator=torch.Generator().manual_seed(9))
    mine = whole.view(sp, -1, HIDDEN)[topology.layout.sp_index(rank)]
    results, caches = [], []
    for pipelined in (False, True):
        events.clear()
        with run_step(Step(Mode.SP, topology, None, num_tokens=tokens, pipelined=pipelined)) as step:
            results.append(piped(torch.arange(tokens), mine, None))
            assert not step.in_attention
        caches.append(dict(core.cache))
        if not pipelined:
            assert events == [("attend", heads.query)], "the ordinary exchange, and attention of all heads at once"
    assert torch.equal(*results)
    assert all(torch.equal(caches[0][name], caches[1][name]) for name in ("k", "v"))
    assert_overlaps(events, piped.groups)


def assert_overlaps(events: list[tuple[str, int]], groups: HeadGroups) -> None:
    """By the order of calls, messages of other groups are under way during attention of each group."""
    count = groups.count
    attends = [i for i, (what, _) in enumerate(events) if what == "attend"]
    assert [events[i][1] for i in attends] == [groups.query_heads(group) for group in range(count)]
    before = events[: attends[0]]
    assert before[:count] == [("send", groups.columns(group)) for group in range(count)], "all are sent first"
    assert before[count:] == [("wait", groups.columns(0))], "and only the first is waited for"
    for group in range(count - 1):
        returned, arrived = ("send", groups.width * groups.query_heads(group)), ("wait", groups.columns(group + 1))
        assert events[attends[group] + 1 : attends[group + 1]] == [returned, arrived]
    outputs = [groups.width * groups.query_heads(group) for group in range(count)]
    assert events[attends[-1] + 1 :] == [("send", outputs[-1]), *(("wait", columns) for columns in outputs)]


@pytest.mark.parametrize("tokens", [1, 5, 24])
@pytest.mark.parametrize("heads", [Heads(8, 1), Heads(6, 2)])
@pytest.mark.parametrize(("world", "sp"), [(2, 2), (4, 4), (4, 2)])
def test_a_layer_overlaps_messages_with_attention(world, sp, heads, tokens):
    run_ranks(world, check_layer, sp, heads, tokens)
