"""A step enters the token-sharded region at the embedding: each rank gets the rows of its own tokens, over gloo."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from harness import GlooGroup, run_ranks, topology_over_gloo
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.runtime_context import get_forward
from sglang_shift.layers.embedding import ShardedLookup, WholeLookup, lookup_for
from sglang_shift.modes import Mode
from sglang_shift.parallel.forwards import Forwards
from sglang_shift.parallel.layout import RankLayout, padded_local_tokens
from sglang_shift.parallel.region import local_rows
from sglang_shift.parallel.step import Step, run_step
from sglang_shift.parallel.topology import Topology
from sglang_shift.runtime.layernorm_sp import sp_entry_scatter
from sglang_shift.runtime.model_runner import ShiftModelRunner

VOCABULARY, WIDTH = 24, 6


class Table(VocabParallelEmbedding):
    """SGLang's embedding, of which each rank has some rows. ``everyone`` is the group of all ranks."""

    def __init__(self, whole, rank, everyone):
        torch.nn.Module.__init__(self)
        self.whole, self.rank, self.everyone = whole, rank, everyone
        self.tp_size = everyone.world_size

    def _embed_local_shard(self, ids):
        mine = ids // (VOCABULARY // self.tp_size) == self.rank
        return self.whole[ids] * mine[:, None].to(self.whole.dtype)

    def forward(self, ids):
        return self.everyone.all_reduce(self._embed_local_shard(ids))


class Scaled(torch.nn.Embedding):
    """An embedding whose class computes more than a lookup, as that of Gemma 3 does."""

    def forward(self, ids):
        return super().forward(ids) * 3


def decode(**fields):
    """A step of which all rows leave the region."""
    return SimpleNamespace(forward_mode=ForwardMode.DECODE, replace_embeds=None, **fields)


def forwards_of(*tables):
    forwards = Forwards()
    for table in tables:
        forwards.replace(table, lookup_for(table))
    return forwards


def rows_of(step, full):
    """This rank's rows of ``full``, without those that pad the last ranks."""
    width = padded_local_tokens(len(full), step.topology.layout.sp_size)
    return full[step.topology.sp_index * width :][:width]


def check_embedding(rank: int, world: int, sp: int, dtype: torch.dtype) -> None:
    everyone = GlooGroup.mine([list(range(world))])
    topology = topology_over_gloo(rank, world, sp)
    generator = torch.Generator().manual_seed(0)
    table = Table(torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype), rank, everyone)
    other = Table(torch.randn(VOCABULARY, 2, generator=generator).to(dtype), rank, everyone)
    positions = Scaled(64, 3, dtype=dtype)
    torch.nn.init.normal_(positions.weight, generator=generator)
    forwards = forwards_of(table, other, positions)
    for tokens in (1, 2, 3, 5, 8, 13, 64):
        ids, places = torch.randint(VOCABULARY, (tokens,), generator=generator), torch.arange(tokens)
        with run_step(Step(Mode.TP, topology, SimpleNamespace(), forwards)):
            full, full_positions = table(ids), positions(places)
        assert torch.equal(full, table.whole[ids])
        with run_step(Step(Mode.SP, topology, decode(), forwards)):
            given = sp_entry_scatter(full)  # as with a request's own embeddings: whole on every rank
        with run_step(Step(Mode.SP, topology, decode(), forwards)) as step:
            rows = table(ids)
            assert step.inside and get_forward().sp_active and step.num_tokens == tokens
            assert torch.equal(rows, given)
            assert rows.shape[0] == padded_local_tokens(tokens, sp)
            assert sp_entry_scatter(rows) is rows, "they are this rank's already"
            # Other tables of the model are read inside of the region.
            assert torch.equal(other(ids), local_rows(step, other.whole[ids]))
            found, mine = positions(places), rows_of(step, full_positions)
            assert torch.equal(found[: len(mine)], mine) and len(found) == len(rows)
            assert torch.equal(found[len(mine) :], full_positions[:1].expand(len(found) - len(mine), -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world", "sp"), [(2, 2), (3, 3), (4, 4), (4, 2), (6, 3)])
def test_each_rank_gets_its_rows_of_the_sum(world, sp, dtype):
    run_ranks(world, check_embedding, sp, dtype)


def check_whole_table(rank: int, world: int) -> None:
    topology = topology_over_gloo(rank, world, world)
    table = Scaled(VOCABULARY, WIDTH)
    torch.nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(0))
    forwards = forwards_of(table)
    topology.sp_group.all_to_all_single = None  # type: ignore[method-assign]  # nothing is sent
    for tokens in (1, 5, 8):
        ids = torch.arange(tokens) % VOCABULARY
        with run_step(Step(Mode.SP, topology, decode(), forwards)) as step:
            rows = table(ids)
            assert step.inside and step.num_tokens == tokens
            mine = rows_of(step, table.weight[ids] * 3)
            assert torch.equal(rows[: len(mine)], mine) and len(rows) == padded_local_tokens(tokens, world)
        assert torch.equal(table(ids), table.weight[ids] * 3)


def test_a_step_also_enters_at_a_table_that_every_rank_has():
    run_ranks(3, check_whole_table)


def check_bytes(rank: int, world: int) -> None:
    sent = []

    class Recording(GlooGroup):
        def all_to_all_single(self, output, input):
            sent.append(input.numel() * (self.world_size - 1) // self.world_size)
            super().all_to_all_single(output, input)

    topology = topology_over_gloo(rank, world, world, Recording)
    table = Table(torch.ones(VOCABULARY, WIDTH), rank, topology.sp_group)
    for tokens in (8, 9):
        with run_step(Step(Mode.SP, topology, decode(), forwards_of(table))):
            table(torch.arange(tokens))
    assert sent == [4 * WIDTH, 5 * WIDTH]


def test_a_rank_sends_the_rows_of_the_others_only():
    run_ranks(2, check_bytes)


class OneRank:
    """The group of all ranks, if this rank's part of a sum is the sum."""

    world_size = 2

    @staticmethod
    def all_reduce(x):
        return x


class First(Table):
    """The table of the first rank, to which all tokens of these tests belong."""

    def __init__(self):
        super().__init__(torch.arange(VOCABULARY * 2.0).view(VOCABULARY, 2), 0, OneRank)


def topology() -> Topology:
    """This process as the second of two ranks, which sends nothing."""
    return Topology(RankLayout(2, 2), 1, None, None, None)  # type: ignore[arg-type]


def test_all_rows_are_looked_up_if_a_request_replaces_some():
    table, ids = First(), torch.arange(4)
    batch = decode()
    batch.replace_embeds = torch.ones(1, 2)
    with run_step(Step(Mode.SP, topology(), batch, forwards_of(table))) as step:
        assert torch.equal(table(ids), table.whole[ids])
        assert not step.inside and not get_forward().sp_active, "the model runner enters the region"


EMBEDS = torch.arange(10.0).view(5, 2)


def arguments_of_the_model(monkeypatch, arguments):
    """What our model runner makes of the arguments that SGLang's model runner gives to the model."""
    monkeypatch.setattr(ModelRunner, "_extend_forward_kwargs", lambda self, batch: dict(arguments))
    return ShiftModelRunner.__new__(ShiftModelRunner)._extend_forward_kwargs(decode())


def test_the_model_gets_this_ranks_rows_of_embeddings_that_a_request_gives(monkeypatch):
    given = {"input_embeds": EMBEDS, "get_embedding": True}
    with run_step(Step(Mode.SP, topology(), decode())) as step:
        found = arguments_of_the_model(monkeypatch, given)
        assert step.inside and step.num_tokens == 5
    assert found.keys() == given.keys() and found["get_embedding"] is True
    assert torch.equal(found["input_embeds"], torch.tensor([[6.0, 7.0], [8.0, 9.0], [0.0, 0.0]]))


def test_the_model_gets_all_rows_of_them_in_tp(monkeypatch):
    given = {"input_embeds": EMBEDS}
    assert arguments_of_the_model(monkeypatch, given)["input_embeds"] is EMBEDS, "outside of a step"
    with run_step(Step(Mode.TP, topology(), decode())):
        assert arguments_of_the_model(monkeypatch, given)["input_embeds"] is EMBEDS


def test_a_step_without_them_enters_at_the_embedding(monkeypatch):
    with run_step(Step(Mode.SP, topology(), decode())) as step:
        assert arguments_of_the_model(monkeypatch, {}) == {} and not step.inside


def test_the_lookup_of_a_table():
    one = First()
    one.tp_size = 1
    kinds = [type(lookup_for(table)) for table in (First(), one, torch.nn.Embedding(2, 2), Scaled(2, 2))]
    assert kinds == [ShardedLookup, WholeLookup, WholeLookup, WholeLookup]
