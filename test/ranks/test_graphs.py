"""Graphs of both modes on two ranks: chosen, padded, replayed, missed; the results are the eager ones."""

from __future__ import annotations

import random
from contextlib import contextmanager

import pytest
import torch
from adapters import write_adapter
from recorded_graphs import recorded_steps, run_model_ranks
from sglang.benchmark.one_batch import decode, extend, prepare_synthetic_inputs_for_latency_test
from sglang.srt.layers.layer_boundary.contracts import BatchVariant
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.model_executor.runner import EagerRunner
from sglang.srt.runtime_context import get_context
from sglang.srt.speculative.ngram_info import NgramVerifyInput
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang_shift.graphs.runners import SpDecodeGraphRunner
from sglang_shift.models.demo import demo_model_path
from sglang_shift.modes import Mode
from transformers import AutoModelForCausalLM

SIZES = [
    *("--cuda-graph-bs-decode", "1", "2", "3", "4", "6", "--cuda-graph-bs-prefill", "4", "8", "13", "24"),
    *("--cuda-graph-backend-prefill", "breakable", "--attention-backend", "recorded"),
    *("--max-total-tokens", "2048", "--max-running-requests", "8"),
]
BOTH = [*SIZES, "--enable-shift-parallel", "--shift-policy", "queue-depth"]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@contextmanager
def eager(runner, mode):
    """Forwards inside run in ``mode`` without graphs."""
    with runner.graphs.without(), runner.running_in(mode):
        yield


def run(runner, context, lengths, decodes=2, adapter=None):
    """Prompts of these lengths and some decode steps: the logits of each step, and whether it replayed a graph."""
    clear(runner)
    ids = random.Random(0)
    prompts = [[ids.randrange(1, 400) for _ in range(n)] for n in lengths]
    reqs = prepare_synthetic_inputs_for_latency_test(len(prompts), 0, prompts)
    for req in reqs:
        req.lora_id = adapter
    with recorded_steps(runner) as (logits, replayed), context:
        ids, _, batch = extend(reqs, runner)
        for _ in range(decodes):
            ids, _ = decode(ids, batch, runner)
    return logits, replayed


def clear(runner):
    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()


def same(some, others):
    return all(a.shape == b.shape and torch.allclose(a, b, **CLOSE) for a, b in zip(some, others, strict=True))


def check_replays(runner):
    assert runner.graphs.captured_sizes() == {
        "decode": {"tp": [1, 2, 3, 4, 6], "sp": [2, 4, 6]},
        "prefill": {"tp": [4, 8, 13, 24], "sp": [4, 8, 14, 24]},
    }
    assert runner.exchange_volume.calls == 2 * runner.model_config.num_hidden_layers
    for lengths, prefill in (
        ([5], True),
        ([2, 1], True),
        ([7, 1, 3], True),
        ([13, 9], True),
        ([1], False),  # SGLang pads to twice the tokens at most
        ([9, 9, 8], False),  # above the largest
        ([1, 2, 1, 3, 1, 2], True),
        ([1, 2, 1, 3, 1, 2, 1], True),
    ):
        expected = [prefill, len(lengths) <= 6, len(lengths) <= 6]
        reference, none = run(runner, eager(runner, Mode.TP), lengths)
        assert none == [False] * 3
        for mode in Mode:
            alone, none = run(runner, eager(runner, mode), lengths)
            assert none == [False] * 3 and same(alone, reference)
            logits, replayed = run(runner, runner.running_in(mode), lengths)
            assert replayed == expected, (mode, lengths)
            assert same(logits, reference), (mode, lengths)
    # A prefill whose exit gathers more than it did for the step before, and less.
    for lengths in ([3, 3], [11], [1, 1, 1, 1]):
        assert same(
            run(runner, runner.running_in(Mode.SP), lengths)[0], run(runner, eager(runner, Mode.TP), lengths)[0]
        )
    assert runner.decode_cuda_graph_runner is not runner.graphs.for_phase(False).sets[Mode.SP].runner, (
        "TP's again, outside of a step"
    )
    check_bytes(runner)


def check_bytes(runner):
    """A replay sends what its graph does: those of 4 tokens and 4 requests, for 3. The formula says how much."""
    sent = []
    for context, requests in ((runner.running_in(Mode.SP), 3), (eager(runner, Mode.SP), 4)):
        with bytes_on_the_wire(runner) as counted:
            run(runner, context, [1] * requests, 1)
        sent.append(sum(counted))
    assert sent == [2 * runner.exchange_volume.bytes_sent(4)] * 2


@contextmanager
def bytes_on_the_wire(runner):
    """What the exchanges around attention send to others meanwhile; the embedding's is a call of its own."""
    exchange, counted = runner.topology.exchange, []
    start, plain = exchange._start, exchange.all_to_all

    def counting(blocks):
        counted.append(blocks.nbytes * (len(blocks) - 1) // len(blocks))
        return start(blocks)

    def uncounted(blocks):
        exchange._start = start
        try:
            return plain(blocks)
        finally:
            exchange._start = counting

    exchange._start, exchange.all_to_all = counting, uncounted
    yield counted
    del exchange._start, exchange.all_to_all


def check_verify_steps(runner):
    """Speculation: three draft tokens a request; the graphs are of 3 T rows."""
    width = 3
    runner.spec_algorithm = SpeculativeAlgorithm.NGRAM
    get_context().override("test", speculative_num_draft_tokens=width)
    runner.recapture_decode_cuda_graph()
    assert runner.graphs.captured_sizes()["decode"] == {"tp": [1, 2, 3, 4, 6], "sp": [2, 4, 6]}
    sp_runner = runner.graphs.for_phase(False).sets[Mode.SP].runner
    assert sp_runner.capture_forward_mode is ForwardMode.TARGET_VERIFY
    assert sp_runner.captured_req_width == width and sp_runner.attn_backend.graph_state == (6, 18)
    assert runner.graphs.for_phase(False).padded(5 * width, width) == {Mode.TP: 6 * width, Mode.SP: 6 * width}
    with runner.running_in(Mode.SP):  # a draft worker prepares the graph of the next forward
        assert runner.decode_cuda_graph_runner is sp_runner
    assert runner.decode_cuda_graph_runner is not sp_runner
    for lengths in ([4], [5, 2, 3], [1, 2, 3, 4, 5, 6, 7]):
        reference = verify(runner, eager(runner, Mode.TP), lengths, width)
        assert not reference.can_run_graph
        assert reference.logits_output.next_token_logits.shape[0] == width * len(lengths)
        for mode in Mode:
            for context, replays in ((eager(runner, mode), False), (runner.running_in(mode), len(lengths) <= 6)):
                output = verify(runner, context, lengths, width)
                assert output.can_run_graph is replays
                assert same([output.logits_output.next_token_logits], [reference.logits_output.next_token_logits])


def verify(runner, context, lengths, width):
    """One verify step of ``width`` draft tokens after each prompt."""
    clear(runner)
    prompts = [list(range(7, 7 + n)) for n in lengths]
    reqs = prepare_synthetic_inputs_for_latency_test(len(prompts), 0, prompts)
    with eager(runner, Mode.TP):
        _, _, batch = extend(reqs, runner)
    prefix, size = torch.tensor(lengths), len(lengths)
    slots = runner.token_to_kv_pool_allocator.alloc(size * width)
    rows = runner.req_to_token_pool.req_to_token
    for i, (index, n) in enumerate(zip(batch.req_pool_indices.tolist(), lengths, strict=True)):
        rows[index, n : n + width] = slots[i * width : (i + 1) * width].to(rows.dtype)
    positions = (prefix[:, None] + torch.arange(width)).flatten()
    forward_batch = ForwardBatch(
        forward_mode=ForwardMode.TARGET_VERIFY,
        batch_size=size,
        input_ids=torch.arange(size * width) + 20,
        req_pool_indices=batch.req_pool_indices,
        seq_lens=prefix,
        seq_lens_cpu=prefix.clone(),
        seq_lens_sum=int(prefix.sum()),
        orig_seq_lens=prefix,
        out_cache_loc=slots,
        positions=positions,
        spec_algorithm=runner.spec_algorithm,
        spec_info=NgramVerifyInput(custom_mask=torch.ones(1, dtype=torch.bool), draft_token_num=width),
        capture_hidden_mode=CaptureHiddenMode.NULL,
        global_forward_mode=ForwardMode.TARGET_VERIFY,
    )
    runner.kv_index_translator.bind_own_plan(forward_batch)
    with context, torch.no_grad():
        return runner.forward(forward_batch)


def check_sums(runner):
    """SGLang may leave a sum to the next layer, to be fused with its norm (FlashInfer's all-reduce); none in SP."""
    for layer in runner.model.model.layers:
        for boundary in (layer.attn_boundary, layer.ffn_boundary):
            tp, sp = (boundary.plan.paths[v] for v in (BatchVariant.ORDINARY, BatchVariant.SEQUENCE_PARALLEL))
            assert tp.output.group is not None and sp.output.group is None
            assert not sp.output.always_partial and not sp.output.may_defer_to_next
            assert sp.entry.declared_sum is None
            assert not sp.exit.may_defer_sum and not sp.exit.defers_mixer_sum


def check_reset(runner):
    """SGLang's weight checker overwrites this rank's shards: the next SP step has those that all ranks have now."""
    with torch.no_grad():  # as the scheduler's event loop runs
        runner.check_weights("reset_tensors", role="target")
    run(runner, eager(runner, Mode.SP), [3], decodes=0)
    weights = [base.weight for base in runner.base_weights.bases.values()]
    used = [weight.clone() for weight in weights]
    runner.base_weights.refresh()
    assert all(map(torch.equal, weights, used))


def check_both(runner):
    check_sums(runner)
    check_replays(runner)
    check_verify_steps(runner)
    check_reset(runner)


@pytest.mark.server
def test_graphs_of_both_modes_give_the_eager_results():
    run_model_ranks(2, check_both, BOTH)


def check_threshold(runner):
    """No size is captured twice; what the threshold would not ask for runs eagerly, or padded."""
    assert runner.graphs.captured_sizes() == {
        "decode": {"tp": [1, 2, 3], "sp": [4, 6]},
        "prefill": {"tp": [], "sp": [4, 8, 14, 24]},
    }
    decodes, prefills = runner.graphs.for_phase(False), runner.graphs.for_phase(True)
    assert [tuple(decodes.padded(n).values()) for n in (3, 5, 7)] == [(3, 4), (6, 6), (7, 7)]
    assert [tuple(prefills.padded(n).values()) for n in (1, 13, 24, 25)] == [(1, 1), (13, 14), (24, 24), (25, 25)]
    for lengths, mode, expected in (
        ([2], Mode.TP, [False, True]),
        ([2] * 5, Mode.TP, [False, False]),
        ([2] * 5, Mode.SP, [True, True]),
        ([2], Mode.SP, [True, True]),
    ):
        logits, replayed = run(runner, runner.running_in(mode), lengths, 1)
        assert replayed == expected
        assert same(logits, run(runner, eager(runner, Mode.TP), lengths, 1)[0])


@pytest.mark.server
def test_a_threshold_divides_the_graphs():
    run_model_ranks(2, check_threshold, [*SIZES, "--enable-shift-parallel", "--shift-threshold", "3"])


def check_sp_alone(runner):
    assert runner.graphs.captured_sizes() == {
        "decode": {"tp": [], "sp": [2, 6]},
        "prefill": {"tp": [], "sp": [14, 24]},
    }
    sp_runner = runner.graphs.for_phase(False).sets[Mode.SP].runner
    assert runner.decode_cuda_graph_runner is None and isinstance(runner.prefill_cuda_graph_runner, EagerRunner)
    assert type(sp_runner) is SpDecodeGraphRunner and sp_runner.attn_backend is runner.attn_backend
    for mode, expected in ((Mode.SP, [True, True]), (Mode.TP, [False, False])):
        logits, replayed = run(runner, runner.running_in(mode), [4, 4], 1)
        assert replayed == expected
        assert same(logits, run(runner, eager(runner, Mode.TP), [4, 4], 1)[0])
    runner.recapture_decode_cuda_graph()
    assert runner.graphs.for_phase(False).sets[Mode.SP].runner is not sp_runner
    assert run(runner, runner.running_in(Mode.SP), [4, 4], 1)[1] == [True, True]


@pytest.mark.server
def test_sp_alone_and_bounded():
    run_model_ranks(2, check_sp_alone, [*SIZES, "--sp-size", "2", "--shift-graph-buckets", "2"])


def check_adapters(runner):
    """TP has graphs for steps with an adapter, although the policy would never choose TP. SP's have no adapters."""
    decodes = runner.graphs.for_phase(False)
    assert {mode: graphs.sizes for mode, graphs in decodes.sets.items()} == {Mode.TP: (1, 2, 3, 4, 6), Mode.SP: (2, 6)}
    manager = runner.lora_manager
    (adapter,) = manager.lora_refs
    made = []
    make = manager.init_decode_cuda_graph_batch_info
    manager.init_decode_cuda_graph_batch_info = lambda **sizes: (made.append(sizes), make(**sizes))
    runner.recapture_decode_cuda_graph()
    assert len(made) == 1, "TP's graphs would go on to read the first buffers"
    for lengths in ([4, 4], [4, 3, 2]):
        bare, _ = run(runner, eager(runner, Mode.TP), lengths)
        for mode, expected in ((Mode.SP, [True, True, True]), (Mode.TP, [False, True, True])):
            logits, replayed = run(runner, runner.running_in(mode), lengths)
            assert same(logits, bare), mode
            assert replayed == expected, "SGLang's torch_native has no prefill graphs with adapters"
        adapted, _ = run(runner, eager(runner, Mode.TP), lengths, adapter=adapter)
        assert not same(adapted, bare)
        logits, replayed = run(runner, runner.running_in(Mode.TP), lengths, adapter=adapter)
        assert same(logits, adapted) and replayed == [False, True, True]


@pytest.mark.server
def test_graphs_with_adapters(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    adapter = write_adapter(tmp_path / "adapter", model, rank=4, seed=1)
    flags = [*SIZES, "--sp-size", "2", "--shift-graph-buckets", "2", "--lora-paths", f"a={adapter}"]
    run_model_ranks(2, check_adapters, flags)


def check_none(runner):
    assert runner.graphs.captured_sizes() == {} and set(runner.graphs.for_phase(False).padded(3).values()) == {3}
    logits, replayed = run(runner, runner.running_in(Mode.SP), [4, 2], 1)
    assert replayed == [False, False]
    assert same(logits, run(runner, runner.running_in(Mode.TP), [4, 2], 1)[0])


@pytest.mark.server
def test_without_graphs():
    run_model_ranks(2, check_none, ["--max-total-tokens", "2048", "--disable-cuda-graph", "--enable-shift-parallel"])
