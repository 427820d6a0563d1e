"""Fit the constants of sglang_shift.plan to AIConfigurator's tables (docs/cost-model.md).

python benchmark/plan_figures.py DATA      # DATA: AIConfigurator's folder systems/data
"""

import sys

import numpy as np
import pandas as pd
from scipy.optimize import minimize


def fit(model, start, seconds):
    """Return the constants with the least mean error in the logarithm, and this error: mean, 90th percentile."""

    def error(p):
        return np.abs(np.log(model(*np.exp(p)) / seconds))

    best = minimize(lambda p: error(p).mean(), np.log(start), method="Nelder-Mead", options={"maxiter": 4000})
    return *np.exp(best.x), error(best.x).mean(), np.quantile(error(best.x), 0.9)


def show(what, latency, *rest):
    rates, (mean, p90) = rest[:-2], rest[-2:]
    print(
        f"{what}: {latency * 1e6:.1f} us, "
        + ", ".join(f"{r / 1e12:.2f} T/s" for r in rates)
        + f"; error {mean:.0%}, p90 {p90:.0%}"
    )


for gpu in ("h100_sxm", "h200_sxm"):
    gemm = pd.read_parquet(f"{sys.argv[1]}/{gpu}/gemm/sglang/0.5.14/gemm_perf.parquet")
    gemm = gemm[(gemm.n >= 1024) & (gemm.k >= 1024) & (gemm.m & (gemm.m - 1) == 0)]
    for dtype, size in (("bfloat16", 2), ("fp8", 1), ("fp8_block", 1)):
        t = gemm[gemm.gemm_dtype == dtype].groupby(["m", "n", "k"]).latency.min().reset_index()
        m, n, k = (t[c].to_numpy(float) for c in "mnk")
        moved, work = n * k * size + m * k * size + 2 * m * n, 2 * m * n * k
        show(
            f"{gpu} GEMM {dtype}",
            *fit(
                lambda t0, rate, flops, moved=moved, work=work: t0 + np.hypot(moved / rate, work / flops),
                (5e-6, 3e12, 1e15),
                t.latency.to_numpy() / 1e3,
            ),
        )
    for phase in ("context", "generation"):
        t = pd.read_parquet(f"{sys.argv[1]}/{gpu}/attention/sglang/0.5.14/{phase}_attention_perf.parquet")
        t = t[
            (t.kernel_source == "fa3")
            & (t.head_dim == 128)
            & (t.window_size == 0)
            & (t.attn_dtype == "bfloat16")
            & (t.num_heads % t.num_key_value_heads == 0)
            & (t.num_heads / t.num_key_value_heads).between(4, 8)
        ]
        for dtype, size in (("bfloat16", 2), ("fp8", 1)):
            x = t[(t.kv_cache_dtype == dtype) & ((t.isl >= 512) | (t.step >= 127))]
            if x.empty:
                continue
            if phase == "context":
                done = 4 * x.batch_size * x.isl * (x.isl + 1) / 2 * x.num_heads * 128
            else:
                done = 2 * x.batch_size * (x.step + 1) * x.num_key_value_heads * 128 * size
            show(
                f"{gpu} attention {phase}, KV cache {dtype}",
                *fit(
                    lambda t0, rate, done=done: t0 + done.to_numpy(float) / rate,
                    (1e-5, 3e12),
                    x.latency.to_numpy() / 1e3,
                ),
            )
    for what, file, column, label in (
        ("all-reduce", "sglang/0.5.14/custom_allreduce", "backend", "sglang_graph"),
        ("all-to-all", "nccl/2.29.2/nccl", "op_name", "alltoall"),
    ):
        t = pd.read_parquet(f"{sys.argv[1]}/{gpu}/comm/{file}_perf.parquet")
        t = t[(t[column] == label) & ~t.get("nccl_dtype", t[column]).eq("int8")]
        sizes = [2**i for i in range(11, 29)]
        print(gpu, what, "bytes", [2 * s for s in sizes])
        for ranks in (2, 4, 8):
            by = t[t.num_gpus == ranks].set_index("message_size").latency
            print(gpu, what, ranks, "us", [float(round(1e3 * by[s], 1)) for s in sizes])
    q = pd.read_parquet(f"{sys.argv[1]}/{gpu}/quantize/vllm/0.24.0/scale_matrix_perf.parquet")
    by = q[q.k == 8192].set_index("m").latency
    print(gpu, f"quantise 8192: {1e3 * by[1]:.1f} us for 1 row; {3 * 8192 * 16384 / by[16384] / 1e9:.2f} T/s for 16384")
