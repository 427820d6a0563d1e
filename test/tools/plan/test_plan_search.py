"""Plans: replicas, the search, and what is recommended in words and flags."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from plan_models import config, known_config
from sglang.srt.configs.model_config import ModelConfig
from sglang_shift.args import dcp_size
from sglang_shift.errors import Refused, ShiftError
from sglang_shift.modes import Mode
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.simulate.traffic import Request, steady
from sglang_shift.tools.plan import report
from sglang_shift.tools.plan.hardware import gpus
from sglang_shift.tools.plan.memory import memory
from sglang_shift.tools.plan.model import Model, read_model
from sglang_shift.tools.plan.search import (
    CHUNKS,
    RATIO_ERROR,
    Candidate,
    offered_load,
    search,
    serve,
    thresholds,
    token_shards_of,
)
from sglang_shift.tools.plan.step_time import StepTimes
from sglang_shift.tools.published import TARGETS

H200 = gpus()["H200"]
LLAMA = Model("llama", TARGETS["llama-70b"].layer, 80, 128_256, 131_072, path="/models/llama")
FP8 = replace(LLAMA, weights="fp8")


class TestServing:
    @pytest.fixture(scope="class")
    def costs(self):
        return StepTimes(FP8, H200, RankLayout(4, 1)).cost_model()

    def test_replicas_take_turns(self, costs):
        requests = [Request(0.0, 100 + i, 10) for i in range(6)]
        both = serve(requests, Candidate(RankLayout(4, 1), 2), costs, 10_000)
        even, odd = (
            serve(part, Candidate(RankLayout(4, 1), 1), costs, 10_000) for part in (requests[::2], requests[1::2])
        )
        assert both.steps[Mode.TP] == even.steps[Mode.TP] + odd.steps[Mode.TP]
        assert both.makespan == pytest.approx(max(even.makespan, odd.makespan))
        assert sorted(s.e2e for s in both.served) == sorted(s.e2e for s in (*even.served, *odd.served))

    def test_a_replica_without_a_request_idles(self, costs):
        alone = serve([Request(5.0, 100, 10)], Candidate(RankLayout(4, 1), 8), costs, 10_000)
        assert len(alone.served) == 1
        assert alone.makespan == pytest.approx(alone.served[0].e2e)

    def test_thresholds_are_where_sp_begins(self):
        costs = StepTimes(FP8, H200, RankLayout(8, 8)).cost_model()
        found = thresholds(costs)
        assert found
        for threshold in found:
            assert any(threshold + 1 == tokens for phase in costs.attention for tokens, _ in costs.crossovers(phase))
        assert thresholds(StepTimes(FP8, H200, RankLayout(8, 1)).cost_model()) == []


class TestTokenShards:
    FOUR = replace(FP8, layer=replace(FP8.layer, kv_heads=4))

    @pytest.mark.parametrize(("asked", "expected"), [(1, [1, 1, 1, 1]), ("auto", [1, 1, 1, 2]), (2, [1, 1, 1, 2])])
    def test_layouts_for_which_it_is_not_possible_have_one(self, asked, expected):
        assert [token_shards_of(self.FOUR, ranks, asked) for ranks in (1, 2, 4, 8)] == expected

    @pytest.mark.parametrize("name", ["gpt-oss-20b", "gemma2", "llama"])
    def test_what_a_server_refuses_is_not_planned(self, name, tmp_path, monkeypatch):
        if name == "gpt-oss-20b":
            known_config(tmp_path, name)
        else:
            config(tmp_path, num_key_value_heads=2, model_type=name, architectures=[f"{name.title()}ForCausalLM"])
        model = read_model(tmp_path)
        ranks = 2 * model.layer.kv_heads
        monkeypatch.setattr(dcp_size, "attention_backends_of", lambda _: ["triton"])
        settings = SimpleNamespace(dcp_size=2, tp_size=ranks)
        try:
            dcp_size.check_dcp_size(settings, ModelConfig(str(tmp_path)))
            served = 2
        except Refused as refusal:
            assert "sliding" in str(refusal)
            served = 1
        assert served == (2 if name == "llama" else 1)
        assert [token_shards_of(model, ranks, asked) for asked in (2, "auto")] == [served, served]

    def test_a_plan_has_the_flags_and_the_tokens(self):
        requests = [Request(i / 4, 2000, 5) for i in range(6)]
        plans = [search(self.FOUR, H200, 8, requests, dcp_size=asked) for asked in (1, "auto")]
        by_layout = [{o.candidate.layout: o.memory.tokens for o in plan.layouts} for plan in plans]
        for layout, tokens in by_layout[0].items():
            assert by_layout[1][layout] == tokens * (2 if layout.world_size == 8 else 1)
        for trial in plans[1].layouts:
            flags = report.flags(trial.candidate, trial.memory, "/models/llama", "bfloat16")
            assert (
                (flags[flags.index("--dcp-size") :][:2] == ["--dcp-size", "2"])
                if trial.candidate.token_shards > 1
                else "--dcp-size" not in flags
            )


class TestSearch:
    @pytest.fixture(scope="class")
    def plan(self):
        requests = steady(20.0, prompt=(500, 4000), output=(10, 60), requests=60)
        return search(FP8, H200, 8, requests)

    def test_the_best_is_the_best_of_all(self, plan):
        ends = [o.metrics["mean_e2e"] for o in (*plan.layouts, *plan.settings) if o.metrics]
        assert plan.best.metrics["mean_e2e"] == min(ends)
        assert plan.best.candidate.layout.world_size > 1  # one prompt at a time is answered by many

    def test_every_layout_chunk_and_policy_is_tried(self, plan):
        assert len(plan.layouts) == 10
        assert {o.candidate.chunk for o in plan.settings} == set(CHUNKS)
        assert {"tp", "sp", "calibrated"} <= {o.candidate.policy for o in plan.settings}

    def test_each_is_charged_the_memory_of_the_modes_that_it_runs(self, plan):
        by = {o.candidate.policy: o for o in plan.settings if o.candidate.chunk == plan.best.candidate.chunk}
        layout = by["calibrated"].candidate.layout
        assert by["tp"].candidate.layout == RankLayout(layout.world_size, 1)
        assert by["sp"].candidate.layout == layout
        assert by["tp"].memory.base == by["tp"].memory.graphs == by["sp"].memory.graphs == 0
        assert by["tp"].memory.tokens > by["sp"].memory.tokens > by["calibrated"].memory.tokens

    def test_what_is_near_is_all_that_the_error_leaves_open(self, plan):
        ends = {candidate: o.metrics["mean_e2e"] for candidate, o in plan.trials.items()}
        most = (1 + RATIO_ERROR) * min(ends.values())
        assert set(plan.alternatives) == {c for c, end in ends.items() if end <= most} - {plan.best.candidate}
        assert list(plan.alternatives.values()) == sorted(plan.alternatives.values())
        assert 0 < len(plan.alternatives) < len(ends) - 1
        printed = report.text(plan, FP8, "8 x H200", "some")
        assert printed.count("\n- ") == len(plan.alternatives)
        assert "prefer the simplest" in printed
        alone = report.text(replace(plan, layouts=[plan.best], settings=[]), FP8, "8 x H200", "some")
        assert "Nothing else that was tried comes within that." in alone

    def test_replicated_experts_are_in_the_command_of_a_server_with_sp(self, plan):
        model = replace(FP8, experts="replicated")
        for trial in plan.layouts:
            printed = report.text(replace(plan, best=trial), model, "8 x H200", "some")
            assert ("--shift-experts replicated" in printed) is (trial.candidate.layout.sp_size > 1)

    def test_gpus_that_idle_are_named(self):
        plan = search(FP8, H200, 3, [Request(0.0, 1000, 10)])
        printed = report.text(plan, FP8, "3 x H200", "some")
        assert plan.best.candidate.layout.world_size == 2
        assert "one replica of P = 2 GPUs" in printed and "1 of 3 GPUs idle" in printed
        assert "| 1 (1 idle) | 2 | 1 |" in printed.replace("**", "") and "| 3 | 1 | 1 |" in printed

    def test_more_traffic_than_is_served_is_ranked_by_peak(self):
        requests = steady(200.0, prompt=4096, output=250, requests=100)
        plan = search(FP8, H200, 8, requests)
        assert plan.offered_load == offered_load(requests) > plan.highest_peak
        assert plan.best.peak == max(o.peak for o in plan.trials.values())
        ends = [o.metrics["mean_e2e"] for o in plan.trials.values()]
        assert plan.best.metrics["mean_e2e"] > min(ends)  # or the ranking would be the same
        printed = report.text(plan, FP8, "8 x H200", "some")
        assert (
            f"brings {plan.offered_load:,.0f} tokens/s, more than any layout serves (at most {plan.highest_peak:,.0f})"
            in printed
        )
        assert "(time per token at the peak)" in printed

    def test_traffic_that_comes_at_once_or_slowly_is_no_overload(self, plan):
        assert offered_load([Request(1.0, 10, 5)] * 3) == 0
        assert offered_load([Request(3.0, 10, 5), Request(1.0, 10, 5)]) == 15
        assert not plan.overloaded
        assert "more than any layout" not in report.text(plan, FP8, "8 x H200", "some")

    def test_a_peak_does_not_depend_on_how_many_requests_there_are(self):
        few, many = (search(FP8, H200, 1, steady(1.0, prompt=1000, output=50, requests=n)) for n in (2, 200))
        assert few.best.peak == pytest.approx(many.best.peak)

    def test_what_is_too_small_is_not_tried(self):
        requests = [Request(0.0, 1000, 10)] * 3
        plan = search(LLAMA, H200, 8, requests)
        small = next(o for o in plan.layouts if o.candidate.layout == RankLayout(1, 1))
        assert (small.metrics, small.peak) == ({}, 0.0)
        assert "too little memory" in report.table(plan.layouts, plan)

    def test_what_fits_nowhere_is_refused(self):
        with pytest.raises(ShiftError, match=r"does not fit 1 x H100: .* longest request .110 tokens; the most is 0"):
            search(LLAMA, gpus()["H100"], 1, [Request(0.0, 100, 10)])

    def test_flags(self):
        base = ["--model-path", "/models/llama", "--tp-size", "8", "--chunked-prefill-size", "4096"]
        # As much as SGLang would reserve, 10240 MiB, and 1024 + 8 * 50 for the other mode's graphs.
        shift = [*base, "--mem-fraction-static", "0.919", "--sp-size", "4", "--enable-shift-parallel"]
        for policy, layout, expected in (
            ("tp", RankLayout(8, 1), base),
            ("sp", RankLayout(8, 4), [*base, "--sp-size", "4"]),
            ("calibrated", RankLayout(8, 4), shift),
            ("tokens 99", RankLayout(8, 4), [*shift, "--shift-policy", "tokens", "--shift-threshold", "99"]),
        ):
            candidate = Candidate(layout, 1, 4096, policy)
            held = memory(FP8, H200, layout, 4096, shifts=candidate.shifts)
            assert report.flags(candidate, held, FP8.path, "bfloat16") == expected
            assert {"--kv-cache-dtype", "fp8_e4m3"} <= set(report.flags(candidate, held, FP8.path, "fp8"))
