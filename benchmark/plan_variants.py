"""Compare the cost model with the paper's table, with other figures for the paper's engine (docs/cost-model.md)."""

from dataclasses import replace

from sglang_shift.tools.plan import paper
from sglang_shift.tools.plan.step_time import Engine


def show(what, step=paper.VLLM_STEP, request=paper.VLLM_REQUEST, gemms=paper.CUTLASS_BLOCK):
    block = Engine(step, request, gemms)
    cells = paper.check(lambda model: block if model.weights == "fp8_block" else Engine(step, request))
    print(what, paper.summary(cells))
    for name in paper.PUBLISHED:
        print("   ", name, paper.summary([c for c in cells if c.model == name]))


show("all")
show("times", gemms={1: 1.0})
show("GEMMs", step=0.0, request=0.0)
show("none", step=0.0, request=0.0, gemms={1: 1.0})
for gemms in ({1: 1.26, 512: 1.44}, {1: 1.25, 512: 1.35}, {1: 1.2, 512: 1.3}, {1: 1.3, 512: 1.5}, {1: 1.31, 512: 1.56}):
    show(gemms, gemms=gemms)
usual = paper.CONFIGURATIONS.copy()
for chunk in (2048, 16384):
    paper.CONFIGURATIONS.update({name: replace(candidate, chunk=chunk) for name, candidate in usual.items()})
    show(f"chunks of {chunk}")
