"""Defines the checks, in the order in which they run: correctness checks before performance checks.

The checks are pytest tests. ``python -m sglang_shift.gpu_check`` runs each check in its own process. Each check imports
its own libraries. So the process that starts and lists the checks imports little. If a library crashes at import, only
the checks that need this library fail.
"""

from __future__ import annotations

import pytest

from sglang_shift.tools.gpu_check.record import Record


@pytest.mark.timeout(60)
def test_kernels(record: Record) -> None:
    """Our pack and unpack kernels are right. Their bandwidth is compared with a copy's bandwidth."""
    from sglang_shift.tools.gpu_check import kernels

    kernels.check(record)


@pytest.mark.timeout(60)
def test_graphs(record: Record) -> None:
    """CUDA graphs of both modes can be captured and replayed, and are right."""
    from sglang_shift.tools.gpu_check import graphs

    graphs.check(record)


@pytest.mark.timeout(300)
def test_fa3(record: Record) -> None:
    """FlashAttention 3 is right on parts of requests, with its log-sum-exp."""
    from sglang_shift.tools.gpu_check import attention

    attention.check_fa3(record)


@pytest.mark.timeout(120)
def test_exchange(record: Record) -> None:
    """FlashInfer's exchange and the collective exchange deliver what was sent."""
    from sglang_shift.tools.gpu_check import exchange

    exchange.check(record)


@pytest.mark.gpus(2)
@pytest.mark.timeout(300)
def test_exchange_gpus(record: Record) -> None:
    """The same exchanges deliver what was sent on several GPUs, with NVLink's kernel."""
    from sglang_shift.tools.gpu_check import exchange

    exchange.check_several(record)


@pytest.mark.gpus(2)
@pytest.mark.timeout(300)
def test_links(record: Record) -> None:
    """All-to-all and all-reduce are timed, from 8 B to 1 GiB."""
    from sglang_shift.tools.gpu_check import links

    links.check(record)


@pytest.mark.gpus(2)
@pytest.mark.timeout(900)
def test_engine_gpus(record: Record) -> None:
    """SGLang on all GPUs at every S: tp, sp and shift equal TP=1."""
    from sglang_shift.tools.gpu_check import engine

    engine.check_several(record)


@pytest.mark.timeout(600)
def test_engine_token_shards(record: Record) -> None:
    """SGLang with two ranks that divide a KV cache by token: tp, sp and shift equal TP=1."""
    from sglang_shift.tools.gpu_check import engine

    engine.check_token_shards(record)


@pytest.mark.timeout(600)
def test_engine_token_shards_fa3(record: Record) -> None:
    """The same with our backend of FlashAttention 3."""
    from sglang_shift.tools.gpu_check import engine

    engine.check_token_shards_fa3(record)


@pytest.mark.timeout(600)
def test_engine_exchange_pipeline(record: Record) -> None:
    """SGLang with two ranks that exchange heads group by group: tp, sp and shift equal TP=1."""
    from sglang_shift.tools.gpu_check import engine

    engine.check_exchange_pipeline(record)


@pytest.mark.timeout(600)
def test_engine_triton(record: Record) -> None:
    """SGLang with Triton's attention: tp, sp and shift equal TP=1."""
    from sglang_shift.tools.gpu_check import engine

    engine.check_triton(record)


@pytest.mark.timeout(600)
def test_engine_flashinfer(record: Record) -> None:
    """SGLang with FlashInfer's attention: tp, sp and shift equal TP=1."""
    from sglang_shift.tools.gpu_check import engine

    engine.check_flashinfer(record)


@pytest.mark.timeout(100)
def test_dispatch(record: Record) -> None:
    """SGLang's own GEMM kernels are right on our views of base weights."""
    from sglang_shift.tools.gpu_check import dispatch

    dispatch.check(record)


@pytest.mark.timeout(600)
def test_quantized(record: Record) -> None:
    """SGLang's kernels of quantized weights are right on stacked shards, and are timed."""
    from sglang_shift.tools.gpu_check import quantized

    quantized.check(record)


@pytest.mark.timeout(90)
def test_steps(record: Record) -> None:
    """A rank's step is timed in both modes, eager and as a graph, without the links."""
    from sglang_shift.tools.gpu_check import steps

    steps.check(record)


@pytest.mark.timeout(540)
def test_engine_memory(record: Record) -> None:
    """SGLang's memory saver frees the base weights and brings them back."""
    from sglang_shift.tools.gpu_check import memory

    memory.check(record)


@pytest.mark.timeout(100)
def test_gemms(record: Record) -> None:
    """A rank's GEMMs are timed in both modes. A view's time is compared with a copy's time."""
    from sglang_shift.tools.gpu_check import gemms

    gemms.check(record)
