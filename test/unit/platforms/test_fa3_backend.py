"""The FlashAttention 3 backend for divided KV caches without ranks: its kernels' calls, its metadata, who gets it."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from divided_requests import VALUE_WIDTH, WIDTH, Pool, layer_of
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_shift.errors import Refused
from sglang_shift.platforms import fa3, fa3_shards
from sglang_shift.platforms.attention import Part
from sglang_shift.platforms.fa3 import FlashAttention3, Pages, Spans, attend_stored
from sglang_shift.platforms.fa3_shards import Fa3ShardedBackend
from sglang_shift.platforms.shards import TokenShards, refuse_fused_writes
from sglang_shift.runtime import scheduler
from torch_attention import TorchKernels


def backend_of(table, *, count=2, rank=0, page_size=1):
    shards = TokenShards(SimpleNamespace(world_size=count, rank_in_group=rank))
    runner = SimpleNamespace(
        device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=table), page_size=page_size,
        token_to_kv_pool=Pool(64, 1, torch.float32),
    )  # fmt: skip
    return Fa3ShardedBackend(runner, shards, TorchKernels())


def table_of(pages, size):
    """The slots of requests whose pages of the allocator are ``pages``."""
    return (torch.tensor(pages).unsqueeze(-1) * size + torch.arange(size)).flatten(1).int()


def decode_of(lengths, **others):
    lengths = torch.tensor(lengths)
    fields = {"seq_lens": lengths, "seq_lens_cpu": lengths, "req_pool_indices": torch.arange(len(lengths))}
    slots = torch.zeros(len(lengths), dtype=torch.int64)
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE, batch_size=len(lengths), out_cache_loc=slots, **{**fields, **others}
    )


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("page_size", [1, 2])
def test_a_rank_finds_each_of_its_tokens(rank, page_size):
    """Page by page, the pages and lengths of a decode name the rows where the rank has written."""
    count, lengths = 3, [1, 3, 13]
    size = count * page_size
    table = table_of([[9, 2, 7, 4, 1], [3, 8, 5, 10, 6], [11, 14, 12, 15, 13]], size)
    backend = backend_of(table, count=count, rank=rank, page_size=page_size)
    backend.init_forward_metadata(decode_of(lengths))
    for row, length in enumerate(lengths):
        slots = table_of([[9, 2, 7, 4, 1], [3, 8, 5, 10, 6], [11, 14, 12, 15, 13]], size)[row, :length]
        backend.init_forward_metadata_in_graph(SimpleNamespace(out_cache_loc=slots.long()))
        written = backend.places[backend.places > 0].tolist()
        pages, own = backend.decode.pages.table[row].tolist(), backend.decode.pages.lengths[row]
        rows = [page * page_size + i for page in pages for i in range(page_size)][:own]
        assert rows == written and own == len(range(rank, length, count))


def test_what_others_store_goes_to_the_first_row():
    backend = backend_of(table_of([[1, 2]], 2), rank=1)
    batch = SimpleNamespace(out_cache_loc=torch.tensor([2, 3, 4, 5, 0]))
    backend.init_forward_metadata_in_graph(batch)
    assert backend.places.tolist() == [0, 1, 0, 2, 0]
    assert batch.dcp_kv_mask.tolist() == [False, True, False, True, False]


def test_models_then_write_no_keys_of_their_own(monkeypatch):
    """Some models write keys in the kernel of the rotary embedding, and know nothing of shards."""
    from sglang.srt.models import utils

    monkeypatch.setattr(utils, "_is_cuda", True)
    monkeypatch.setattr(utils, "get_token_to_kv_pool", lambda: SimpleNamespace(dtype=torch.bfloat16))
    monkeypatch.setattr(utils, "is_cp_active", lambda batch: False)
    batch = decode_of([3])
    assert utils.enable_fused_set_kv_buffer(batch)
    backend_of(table_of([[1, 2]], 2)).init_forward_metadata(batch)
    assert not utils.enable_fused_set_kv_buffer(batch)


def test_models_that_write_keys_themselves_are_refused_with_sglangs_backend():
    """SGLang's rotary kernel would write each key at its slot in the group, as if it were a row of the rank's pool."""
    from sglang.srt.models import llama, qwen3_moe

    model = torch.nn.Sequential(type("Layer", (torch.nn.Module,), {"__module__": llama.__name__})())
    refuse_fused_writes(model, 2, "triton")
    model.append(type("Layer", (torch.nn.Module,), {"__module__": qwen3_moe.__name__})())
    refuse_fused_writes(model, 1, "triton")
    refuse_fused_writes(model, 2, "fa3")
    with pytest.raises(Refused, match=r"--dcp-size 2 is not served for Sequential with .* triton on GPUs"):
        refuse_fused_writes(model, 2, "triton")


def test_graphs_keep_their_tensors():
    """A step fills what all graphs read. It leaves the columns alone that no request of the step has."""
    table = table_of([[1, 2, 3, 4], [5, 6, 7, 8]], 2)
    backend = backend_of(table)
    backend.init_cuda_graph_state(3, 3)
    blank = decode_of([1, 1, 1], seq_lens_cpu=None, req_pool_indices=torch.zeros(3, dtype=torch.int64))
    backend.init_forward_metadata_out_graph(blank, in_capture=True)
    captured = backend.decode
    assert captured.pages.table.shape == (3, 4) and captured.queries.starts.tolist() == [0, 1, 2, 3]
    rows = torch.tensor([0, 1, 0])
    backend.init_forward_metadata_out_graph(decode_of([3, 6, 1], req_pool_indices=rows))
    assert captured.pages.lengths.tolist() == [2, 3, 1]
    assert captured.pages.table[:, :3].tolist() == [[1, 2, 3], [5, 6, 7], [1, 2, 3]]
    assert backend.decode.pages.table.data_ptr() == captured.pages.table.data_ptr()
    with pytest.raises(NotImplementedError, match="graphs of EXTEND cannot be captured with --dcp-size"):
        backend.init_forward_metadata_out_graph(SimpleNamespace(forward_mode=ForwardMode.EXTEND))


def test_a_step_without_requests():
    backend = backend_of(table_of([[1, 2]], 2))
    idle = decode_of([])
    idle.forward_mode = ForwardMode.IDLE
    backend.init_forward_metadata(idle)
    assert backend.decode.pages.lengths.tolist() == []


def test_drafts_and_layers_that_are_not_causal_are_refused():
    backend = backend_of(table_of([[1, 2]], 2))
    verify = decode_of([3])
    verify.forward_mode = ForwardMode.TARGET_VERIFY
    backend.init_forward_metadata(verify)
    q, k, v = torch.zeros(1, 4 * WIDTH), torch.zeros(1, 1, WIDTH), torch.zeros(1, 1, VALUE_WIDTH)
    with pytest.raises(NotImplementedError, match="drafts cannot be verified with --dcp-size 2"):
        backend.forward_extend(q, k, v, layer_of(4), verify)
    encoder = layer_of(4, attn_type=AttentionType.ENCODER_ONLY)
    with pytest.raises(NotImplementedError, match="is not causal; serve this model without --dcp-size"):
        backend.forward_extend(q, k, v, encoder, verify)


class TestKernels:
    """SGLang's functions are given what they take. The tests have no kernel."""

    rows = Spans.of([2, 3], "cpu")

    @pytest.fixture
    def calls(self, monkeypatch):
        calls = []
        for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):
            signature = inspect.signature(getattr(fa3, name))

            def record(*args, signature=signature, **kwargs):
                calls.append(signature.bind(*args, **kwargs).arguments)
                q = kwargs["q"]
                return q, torch.arange(q.shape[1] * q.shape[0]).view(q.shape[1], q.shape[0]).float(), None

            monkeypatch.setattr(fa3, name, record)
        return calls

    def test_rows(self, calls):
        q, k = torch.zeros(5, 4, 8), torch.zeros(5, 1, 8)
        options = {"scale": 0.5, "cap": 3.0, "causal": True}
        part = FlashAttention3().attend_rows(q, k, k, self.rows, self.rows, **options)
        assert part.lse.shape == (5, 4) and part.lse[0].tolist() == [0, 5, 10, 15]
        assert calls[0]["cu_seqlens_q"].tolist() == calls[0]["cu_seqlens_k"].tolist() == [0, 2, 5]
        given = {name: calls[0][name] for name in ("max_seqlen_q", "max_seqlen_k", "softmax_scale", "softcap")}
        assert given == {"max_seqlen_q": 3, "max_seqlen_k": 3, "softmax_scale": 0.5, "softcap": 3.0}
        assert calls[0]["causal"] and calls[0]["return_softmax_lse"] and calls[0]["ver"] == 3

    def test_pages(self, calls):
        q, cache = torch.zeros(5, 4, 8), torch.zeros(7, 4, 1, 8)
        pages = Pages(torch.zeros(2, 3, dtype=torch.int32), torch.tensor([9, 1], dtype=torch.int32))
        part = FlashAttention3().attend_pages(q, cache, cache, self.rows, pages, scale=0.5, cap=0.0)
        assert part.lse.shape == (5, 4) and part.lse[0].tolist() == [0, 5, 10, 15]
        assert calls[0]["page_table"] is pages.table and calls[0]["cache_seqlens"] is pages.lengths
        given = {name: calls[0][name] for name in ("max_seqlen_q", "softmax_scale", "softcap", "causal")}
        assert given == {"max_seqlen_q": 3, "softmax_scale": 0.5, "softcap": 0.0, "causal": False}
        assert calls[0]["return_softmax_lse"] and calls[0]["ver"] == 3

    @pytest.mark.parametrize("news", [[1, 1, 1], [2, 1, 4]])
    def test_rows_without_keys(self, news):
        """What a kernel gives them, such as +inf and NaN, would end in every output."""
        lengths = torch.tensor([3, 0, 2], dtype=torch.int32)
        pages = Pages(torch.tensor([[1, 2], [9, 9], [3, 9]], dtype=torch.int32), lengths)
        rows = sum(news)
        q, cache = torch.randn(rows, 4, 8), torch.randn(10, 2, 1, 8)
        part = attend_stored(TorchKernels(), q, cache, cache, Spans.of(news, "cpu"), pages, scale=1.0, cap=0.0)
        empty = [False] * news[0] + [True] * news[1] + [False] * news[2]
        assert isinstance(part, Part) and part.output.isfinite().all()
        assert (part.lse == -math.inf).all(1).tolist() == empty and (part.output == 0).all(-1).all(-1).tolist() == empty


class TestRegistration:
    @pytest.fixture
    def runner(self, monkeypatch):
        monkeypatch.setattr(fa3_shards, "create_flashattention_v3_backend", lambda runner: "SGLang's")
        monkeypatch.setitem(ATTENTION_BACKENDS, "fa3", ATTENTION_BACKENDS["fa3"])
        fa3_shards.register()
        return SimpleNamespace(
            device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(2, 8)), page_size=1,
            token_to_kv_pool=SimpleNamespace(), kv_cache_dtype=torch.bfloat16, dtype=torch.bfloat16,
        )  # fmt: skip

    @pytest.fixture
    def two(self, monkeypatch):
        group = SimpleNamespace(world_size=2, rank_in_group=1)
        monkeypatch.setattr(fa3_shards, "get_dcp_group_no_assert", lambda: group)

    def test_a_rank_registers_it_before_its_worker(self, monkeypatch):
        """The worker makes the backends."""
        monkeypatch.setitem(ATTENTION_BACKENDS, "fa3", None)
        for module, name in (("seams", "verify"), ("cpu", "verify"), ("agreement", "check")):
            monkeypatch.setattr(getattr(scheduler, module), name, lambda *_: None)
        monkeypatch.setattr(scheduler, "shift_config_of", lambda _: object())
        monkeypatch.setattr(scheduler, "get_device", lambda: SimpleNamespace(gpu_id=0))
        monkeypatch.setattr(scheduler, "ShiftTpModelWorker", lambda **_: ATTENTION_BACKENDS["fa3"])
        rank = SimpleNamespace(server_args=None, nccl_port=0)
        scheduler.ShiftScheduler.init_tp_model_worker(rank)
        assert rank.tp_worker is fa3_shards.make_backend

    def test_one_rank_alone_has_sglangs_own(self, runner):
        assert ATTENTION_BACKENDS["fa3"](runner) == "SGLang's"

    def test_two_ranks_have_ours(self, runner, two):
        backend = ATTENTION_BACKENDS["fa3"](runner)
        assert isinstance(backend, Fa3ShardedBackend) and isinstance(backend.kernels, FlashAttention3)
        assert (backend.shards.count, backend.shards.rank, backend.stride) == (2, 1, 2)

    def test_a_cache_of_8_bits_is_refused(self, runner, two):
        """A checkpoint may ask for it, and --kv-cache-dtype is then auto."""
        runner.kv_cache_dtype = torch.float8_e4m3fn
        with pytest.raises(Refused, match=r"the KV cache has torch.float8_e4m3fn and the model torch.bfloat16, which"):
            ATTENTION_BACKENDS["fa3"](runner)

    def test_pages_by_head_are_refused(self, runner, two):
        runner.token_to_kv_pool.use_hnd = True
        with pytest.raises(Refused, match="SGLANG_USE_HND_KVCACHE is not served with --dcp-size 2"):
            ATTENTION_BACKENDS["fa3"](runner)
