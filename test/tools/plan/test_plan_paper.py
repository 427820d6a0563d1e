"""The cost model beside the paper's table: what it says is what the docs say."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest
from harness import REPO
from sglang_shift.models.decoder_layer import Layer
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.simulate.traffic import Request
from sglang_shift.tools.plan import paper, report
from sglang_shift.tools.plan.hardware import gpus
from sglang_shift.tools.plan.model import Model
from sglang_shift.tools.plan.search import RATIO_ERROR, Candidate, serve
from sglang_shift.tools.plan.step_time import Engine, StepTimes

DOCS = REPO / "docs" / "cost-model.md"


@pytest.fixture(scope="module")
def cells():
    return paper.check()


@pytest.fixture(scope="module")
def plain():
    """As plans are made."""
    return paper.check(lambda model: Engine())


def test_the_report_is_the_one_in_the_docs():
    assert paper.report() in DOCS.read_text()


def test_what_plans_say_of_their_errors(plain):
    assert fmean(abs(c.error) for c in plain) == pytest.approx(report.PREDICTION_ERROR, abs=0.005)
    assert fmean(paper.ratio_errors(plain)) == pytest.approx(RATIO_ERROR, abs=0.005)


def test_what_is_off_alike_is_not_in_a_comparison(cells):
    def slowed(factors):
        return [replace(c, predicted=factors[c.configuration] * c.published) for c in cells]

    alike, apart = ({"DP": 0.5, "TP": 0.5, "SP": 0.5, "Shift": last} for last in (0.5, 0.4))
    assert paper.ratio_errors(slowed(alike)) == pytest.approx([0] * 12)
    assert sorted(paper.ratio_errors(slowed(apart))) == pytest.approx([0] * 6 + [0.25] * 6)


def test_errors_are_relative_to_what_was_published(cells):
    assert len(cells) == 24
    cell = next(c for c in cells if (c.model, c.configuration, c.metric) == ("Llama-70B", "TP", "TPOT, ms"))
    assert cell.published == 9.34
    assert cell.error == pytest.approx((cell.predicted - 9.34) / 9.34)


def test_most_cells_are_near_and_none_is_far_off(cells):
    """As the docs claim; a change of the model that makes it worse must say so there."""
    assert sum(abs(c.error) <= paper.GOAL for c in cells) >= 18
    assert all(abs(c.error) < 0.3 for c in cells)


def test_the_order_of_the_configurations_is_the_papers(cells):
    for model, rows in paper.PUBLISHED.items():
        for metric in paper.METRICS:
            mine = {c.configuration: c.predicted for c in cells if (c.model, c.metric) == (model, metric)}
            published = {name: row[paper.METRICS.index(metric)] for name, row in rows.items()}
            for a, b in (("DP", "TP"), ("TP", "SP")):
                assert (mine[a] < mine[b]) == (published[a] < published[b]), (model, metric, a, b)


def test_vllms_own_times_are_what_is_left_of_a_published_run():
    """Llama 3.2 1B, 500 tokens in and 50 out: median TTFT 21.00 ms and TPOT 2.64 ms, vllm-project/vllm#17866."""
    model = Model("Llama-3.2-1B", Layer(2048, 8192, 32, 8, 64), 16, 128_256, 131_072, tied_embeddings=True)
    costs = StepTimes(model, gpus()["H100"], RankLayout(1, 1)).cost_model()
    alone = serve([Request(0.0, 500, 50)], Candidate(RankLayout(1, 1), 1), costs, 10_000).served[0]
    assert alone.ttft + paper.VLLM_REQUEST == pytest.approx(0.0210, rel=0.01)
    assert alone.tpot + paper.VLLM_STEP == pytest.approx(0.00264, rel=0.01)
