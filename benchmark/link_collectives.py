"""Compare the times of gloo's collectives with the rate of an emulated link (docs/emulated-link.md). Needs root.

python benchmark/link_collectives.py P RATE      # RATE in bits per second
"""

import subprocess
import sys
import time
from statistics import median

import torch
import torch.distributed as dist
from sglang_shift.tools.benchmark.link import Link


def rank(mine, ranks, address, rate):
    dist.init_process_group("gloo", f"tcp://{address}", rank=mine, world_size=ranks)
    for size in (8 << 20, 2 << 20, 512 << 10, 128 << 10, 16 << 10):
        x = torch.ones(size // 2, dtype=torch.bfloat16)
        for name, share, call in (
            ("all_reduce", 2, lambda x=x: dist.all_reduce(x.fill_(1))),
            ("all_to_all", 1, lambda x=x: dist.all_to_all_single(torch.empty_like(x), x)),
            ("messages", 1, lambda x=x: messages(mine, x.chunk(ranks), torch.empty_like(x).chunk(ranks))),
        ):
            times = []
            for _ in range(15):
                dist.barrier()
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            if mine == 0:
                formula = share * (ranks - 1) / ranks * size * 8 / rate
                print(
                    f"{name} {size >> 10} KiB: formula {1e3 * formula:.2f} ms, "
                    f"median {median(times) / formula:.2f} x, most {max(times) / formula:.2f} x"
                )


def messages(mine, blocks, received):
    others = [rank for rank in range(len(blocks)) if rank != mine]
    works = [dist.irecv(received[rank], rank) for rank in others] + [dist.isend(blocks[rank], rank) for rank in others]
    for work in works:
        work.wait()


if len(sys.argv) == 3:
    ranks, rate = int(sys.argv[1]), float(sys.argv[2])
    with Link(ranks, rate) as link:
        for process in [
            subprocess.Popen(
                [
                    "env",
                    *(f"{k}={v}" for k, v in link.environment(r).items()),
                    *link.command(r, [sys.executable, __file__, str(r), str(ranks), link.rendezvous, str(rate)]),
                ]
            )
            for r in range(ranks)
        ]:
            process.wait()
else:
    rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
