"""Figures, tables and plots of made-up visits, against values worked out by hand."""

from __future__ import annotations

import csv
import json
import struct
import sys
from math import nan

import pytest
from msgspec.structs import replace
from sglang_shift.errors import ShiftError
from sglang_shift.modes import Mode
from sglang_shift.tools.benchmark import goals, plots, report
from sglang_shift.tools.benchmark.figures import HIGHER_IS_BETTER, Comparison, Limits, Spread, figures
from sglang_shift.tools.benchmark.records import InstanceChange, RequestRecord, Sample, Visit

NAMES = ("stock-tp", "stock-dp", "sp", "shift")
FAILED = RequestRecord(0.5, 0.5, 9.0, 99.0, [9.0], 7777, 777, 77, "timeout")


def request(ttft=0.1, tpot=0.01, *, prompt=1000, output=11, due=0.0, cached=0):
    itl = [tpot] * (output - 1)
    return RequestRecord(due, due, ttft, ttft + tpot * (output - 1), itl, prompt, output, cached)


def visit(contender="shift", workload="bursty", factor=1.0, *, number=1, requests=None, x=None, **options):
    """One whose times are ``factor`` times as long as they might be; the kind is the workload's first word."""
    if requests is None:
        requests = [request(0.1 * factor * (i + 1), 0.01 * factor, due=float(i)) for i in range(5)]
    ours = contender in ("sp", "shift")
    samples = [Sample(i, i, 5 - i, i / 10, {Mode.TP: 10 * i, Mode.SP: 30 * i} if ours else {}) for i in range(6)]
    shift = {"tp_steps": 50, "sp_steps": 150, "switches": 9, "exchanged_bytes": 3 << 20, "exchanges": 7}
    made = Visit(contender, workload, workload.split()[0], x, number, 10.0 * factor, requests, samples)
    return replace(made, shift=shift if ours else None, **options)


def campaign(rounds=3):
    """All kinds but mooncake. Against ``stock-tp``: DP 0.5 x, SP 0.8 x, ours 0.4 x, in all times; rounds 1, 2, 4 x."""
    loads = [(f"single {n}", n) for n in (128, 4096)] + [("rate 2/s", 2.0), ("rate 0.5/s", 0.5)]
    loads += [(kind, None) for kind in ("saturated", "bursty", "long-mix", "azure")]
    return [
        visit(name, workload, factor * 2**number, number=number, x=x)
        for number in range(1, rounds + 1)
        for name, factor in zip(NAMES, (1.0, 0.5, 0.8, 0.4), strict=True)
        for workload, x in loads
    ]


def test_figures_of_a_visit():
    requests = [request(0.1 * (i + 1), 0.01 * (i + 1), prompt=100, output=11, cached=25) for i in range(5)]
    found = figures(visit(requests=[*requests, FAILED]), Limits(ttft=0.35, e2e=0.5))
    expected = {
        "requests": 6, "errors": 1, "seconds": 10.0,
        "ttft_p50": 0.3, "ttft_p90": 0.46, "ttft_p99": 0.496, "ttft_mean": 0.3,  # 0.1 to 0.5; p90 at place 3.6
        "tpot_p50": 0.03, "tpot_p90": 0.046, "tpot_mean": 0.03,
        "e2e_p50": 0.6, "e2e_p99": 0.992,  # 0.2, 0.4 to 1.0
        "itl_p50": 0.03, "itl_p90": 0.05, "itl_mean": 0.03,  # ten of each; p90 at place 44.1
        "gap_p50": 0.03, "gap_p90": 0.05, "gap_max": 0.05,
        "requests_per_s": 0.5, "total_tokens_per_s": 55.5, "output_tokens_per_s": 5.5,
        "goodput": 0.2, "goodput_share": 2 / 6,  # the first two: the third takes 0.6 s
        "cached_share": 0.25,
        "kv_mean": 0.25, "kv_max": 0.5, "queue_mean": 2.5, "queue_max": 5,
        "tp_steps": 50, "sp_steps": 150, "switches": 9, "exchanged_bytes": 3 << 20,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_single_tokens_have_no_tpot_and_meet_any_limit_of_it():
    found = figures(visit(requests=[request(output=1)]), Limits(tpot=1e-9))
    assert not [name for name in found if name.startswith(("tpot", "itl"))]
    assert found["e2e_p99"] == found["ttft_p50"] == 0.1
    assert found["goodput_share"] == 1.0


@pytest.mark.parametrize("seconds", [0.0, 10.0])
def test_nothing_but_failures(seconds):
    found = figures(visit("stock-tp", requests=[FAILED, FAILED], samples=[], seconds=seconds), Limits(ttft=1e9))
    assert found == {"seconds": seconds, "requests": 2, "errors": 2, **dict.fromkeys(HIGHER_IS_BETTER, 0.0)}


def test_what_servers_do_not_tell_and_limits_that_are_not_given_have_no_figures():
    found = figures(visit("stock-tp", samples=[Sample(0.0, waiting=3), Sample(1.0)]))
    assert found["queue_mean"] == 3
    assert not {"kv_max", "goodput", "goodput_share", "tp_steps"} & set(found)


REJECTED = RequestRecord(0.5, 0.5, 0.0, 0.0, [], 0, 0, error="rejected: too long", rejected=True, group="long")
UNFINISHED = RequestRecord(0.5, 0.5, 0.0, 0.0, [], 0, 0, error="not answered", unfinished=True, group="short")


def test_only_what_ends_in_the_window_is_completed():
    requests = [request(1.0, 0.0, prompt=89, output=11, due=float(i)) for i in range(10)]  # they end at 1, 2 to 10 s
    found = figures(visit(requests=requests, window=(2.0, 6.0)))
    assert found["completed_tokens_per_s"] == pytest.approx(4 * 100 / 4)
    assert "completed_tokens_per_s" not in figures(visit(requests=requests))


def test_groups_of_requests():
    short, long = (replace(request(ttft), group=name) for ttft, name in ((0.1, "short"), (4.0, "long")))
    found = figures(visit(requests=[short, long, REJECTED, UNFINISHED]))
    assert (found["requests"], found["errors"], found["rejected"], found["unfinished"]) == (4, 0, 1, 1)
    assert (found["short/ttft_p50"], found["long/ttft_p99"]) == pytest.approx((0.1, 4.0))
    assert (found["short/unfinished"], found["long/rejected"], found["long/requests"]) == (1, 1, 2)
    assert "short/rejected" not in found


def instance_visit(contender, tokens_per_s, workload="mixed-lengths 0.2%", rejected=False):
    """A visit whose requests end in the window, with ``tokens_per_s`` tokens in each of its 10 seconds."""
    answered = replace(request(1.0, 0.0, prompt=10 * tokens_per_s - 1, output=1, due=1.0), group="short")
    return visit(contender, workload, requests=[answered, *[REJECTED] * rejected], window=(0.0, 10.0))


def test_levels_and_changes():
    samples = [Sample(0.0, levels={1: 4}), Sample(1.0, levels={1: 2, 2: 2}), Sample(2.0, levels={4: 4})]
    changes = [
        InstanceChange(1, 0, 2, 2, True, {"plan": 0.1, "exchange": 0.3}),
        InstanceChange(2, 0, 4, 4, True, {"plan": 0.1, "exchange": 0.5}),
        InstanceChange(3, 0, 4, 1, False, {"plan": 9.0}),
        InstanceChange(4, 0, 4, 1, True, {"plan": 0.2}),
    ]
    made = replace(instance_visit("instances:4:paper", 100), samples=samples, changes=changes)
    found = figures(made)
    expected = {
        "at_level_1": 0.5, "at_level_2": 0.5 / 3, "at_level_4": 1 / 3, "merges": 2, "splits": 1, "failed_changes": 1,
        "merge_s": 0.5, "merge_plan_s": 0.1, "merge_exchange_s": 0.4, "split_s": 0.2, "split_plan_s": 0.2,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    lines = report.tables(Comparison([made, instance_visit("stock-dp", 100, rejected=True)])).splitlines()
    for row in (
        "| completed tokens/s in the window | **100** | **100** |", "| short: requests | 1 | 1 |",
        "| long: rejected requests | - | 1 |", "| time at level 2, % | 16.7 | - |", "| merges | 2 | - |",
        "| merge, ms | 500 | - |", "| merge: exchange, ms | 400 | - |", "| rejected requests | - | 1 |",
    ):  # fmt: skip
        assert any(line.endswith(row) for line in lines), (row, lines)


def test_goals_of_instances():
    visits = [
        instance_visit("instances:4:paper", 180),
        instance_visit("stock-dp", 300, rejected=True),
        instance_visit("stock-tp", 80),
        instance_visit("shift", 100),
        *(instance_visit(name, n, "closed-loop") for name, n in (("instances:4:paper", 96), ("stock-dp", 100))),
    ]
    rows = [line.split(" | ")[1:] for line in goals.table(Comparison(visits)).splitlines()[2:]]
    assert [(workload, got, verdict.rstrip(" |")) for workload, _, got, verdict in rows] == [
        ("`mixed-lengths 0.2%`", "1.800", "met"),  # DP is no peer, because it refuses requests
        ("`mixed-lengths 0.2%`", "1.800", "met"),  # beside Shift alone
        ("`closed-loop`", "0.960", "**missed**"),
    ]
    assert "the best of `stock-tp`, `shift`" in rows[0][1]
    assert goals.table(Comparison(visits[1:4])) == ""
    assert "## Goals of instances" in report.markdown(Comparison(visits), {})


def times(**ttfts):
    """By contender, the TTFT of each round; None where it was not visited, 0 where all requests failed."""
    return Comparison(
        visit(name.replace("_", "-"), number=i + 1, requests=[request(ttft) if ttft else FAILED])
        for name, values in ttfts.items()
        for i, ttft in enumerate(values)
        if ttft is not None
    )


def test_ratios_are_taken_within_a_round():
    compared = times(shift=[1.0, 8.0, 3.0], sp=[2.0, 4.0, 4.0], stock_tp=[4.0, 16.0, 2.0])
    assert compared.spread("shift", "bursty", "ttft_p50") == Spread(3.0, 1.0, 8.0, 3)
    assert compared.ratio("shift", ["sp"], "bursty", "ttft_p50") == Spread(0.75, 0.5, 2.0, 3)
    assert compared.ratio("shift", ["sp", "stock-tp"], "bursty", "ttft_p50") == Spread(1.5, 0.5, 2.0, 3)
    slower = [visit("sp", factor=2.0), visit("stock-tp", factor=4.0), visit("shift", factor=1.0)]
    assert Comparison(slower).ratio("shift", ["sp", "stock-tp"], "bursty", "total_tokens_per_s").median == 2.0
    with pytest.raises(ValueError, match="kv_max has no best"):
        compared.ratio("shift", ["sp", "stock-tp"], "bursty", "kv_max")


def test_rounds_without_one_of_the_others_do_not_count():
    compared = times(shift=[1.0, 2.0, 3.0], sp=[2.0, None, 2.0], stock_tp=[4.0, 1.0, 0])
    assert compared.ratio("shift", ["sp", "stock-tp"], "bursty", "ttft_p50") == Spread(0.5, 0.5, 0.5, 1)
    failing = times(shift=[1.0], sp=[2.0], stock_tp=[0])
    assert failing.ratio("shift", ["sp", "stock-tp"], "bursty", "ttft_p50").low == 0.5
    assert times(shift=[1.0, None], sp=[None, 1.0]).ratio("shift", ["sp"], "bursty", "ttft_p50") is None


def test_a_visit_made_again_replaces_the_first():
    compared = Comparison([visit(factor=1.0), visit(factor=3.0)])
    assert compared.spread("shift", "bursty", "seconds") == Spread(30.0, 30.0, 30.0, 1)


def test_tables():
    lines = report.tables(Comparison(campaign(), Limits(ttft=1.0))).splitlines()
    kinds = [line.removeprefix("## ") for line in lines if line.startswith("#")]
    assert kinds == ["single", "saturated", "rate", "bursty", "long-mix", "azure"]
    assert "| workload | | `stock-tp` | `stock-dp` | `sp` | `shift` | `shift` / best baseline |" in lines
    assert [line.split("`")[1] for line in lines if line.startswith("| `rate")] == ["rate 0.5/s", "rate 2/s"]
    bursty = lines[lines.index("## bursty") :]
    assert bursty[4] == (
        "| `bursty` | TTFT p50, ms | 1200 (600 to 2400) | 600 (300 to 1200) | 960 (480 to 1920) | "
        "**480** (240 to 960) | 0.800 (0.800 to 0.800) |"
    )
    assert [row.split(" | ")[1] for row in bursty[5:17]] == [
        "TTFT p99, ms", "TPOT p50, ms", "TPOT p99, ms", "E2E p50, ms", "E2E p99, ms",
        "gap p50, ms", "gap p99, ms", "gap max, ms", "total tokens/s", "output tokens/s",
        "goodput, requests/s", "good requests, %",
    ]  # fmt: skip
    assert "|  | exchanged, MiB | - | - | 3 (3 to 3) | 3 (3 to 3) |  |" in bursty
    assert "|  | steps TP / SP | - | - | 50 / 150 | 50 / 150 |  |" in bursty
    assert not [line for line in lines if "failed" in line]


def test_one_round_and_strange_names():
    compared = Comparison([visit("url:a/b|c`"), visit("stock-tp", requests=[request(), FAILED])])
    lines = report.tables(compared).splitlines()
    assert lines[2] == "| workload | | `url:a/b\\|c'` | `stock-tp` |"
    assert lines[4] == "| `bursty` | TTFT p50, ms | 300 | **100** |"
    assert "|  | failed requests | 0 | 1 |" in lines


def test_targets():
    found = report.verdicts(Comparison(campaign()))
    saturated = [(o.ratio.median, o.is_met) for o in found if o.workload == "saturated"]
    assert saturated == [(pytest.approx(2.5), True), (pytest.approx(1.25), True)]
    assert [o.note for o in found if o.is_met is None] == ["not measured"] * 2  # mooncake
    assert sum(o.is_met is True for o in found) == 4 + 2 + 4 + 2


@pytest.mark.parametrize(
    ("workload", "metric", "factors", "met"),
    [
        ("single 128", "TTFT p50", (1.0, 2.0, 2.0, 1.015), True),
        ("single 128", "TTFT p50", (2.0, 1.0, 2.0, 1.025), False),
        ("single 128", "TPOT p50", (1.0, 0.5, 0.5, 1.015), True),  # to stock TP alone
        ("single 128", "TPOT p50", (1.0, 2.0, 2.0, 1.025), False),
        ("rate 2/s", "TPOT p50", (1.0, 1.0, 1.0, 1.025), True),
        ("rate 2/s", "TTFT p50", (2.0, 2.0, 1.0, 1.035), False),
        ("azure", "E2E p99", (1.0, 1.0, 1.0, 0.999), True),
        ("mooncake", "E2E p50", (1.0, 1.0, 1.0, 1.001), False),
    ],
)
def test_bounds_of_latencies(workload, metric, factors, met):
    visits = [visit(name, workload, factor, x=1.0) for name, factor in zip(NAMES, factors, strict=True)]
    found = report.verdicts(Comparison(visits))
    assert [o.is_met for o in found if o.workload == workload and o.target.startswith(metric)] == [met]


@pytest.mark.parametrize(("tp", "dp", "met"), [(1.55, 0.95, (True, True)), (1.45, 0.85, (False, False))])
def test_bounds_of_the_throughput(tp, dp, met):
    visits = [visit("shift", "saturated"), visit("stock-tp", "saturated", tp), visit("stock-dp", "saturated", dp)]
    found = report.verdicts(Comparison(visits))
    assert tuple(o.is_met for o in found if o.workload == "saturated") == met


def test_targets_without_a_contender_are_left_out_and_failures_are_told():
    visits = [visit("shift", "azure", requests=[FAILED, request()]), visit("stock-tp", "azure")]
    text = report.targets_table(Comparison(visits))
    assert "- `azure`: no visit of `stock-dp`, `sp` (E2E p50" in text
    assert "No target can be judged." in text
    text = report.targets_table(Comparison([*visits, *(visit(name, "azure") for name in ("stock-dp", "sp"))]))
    assert text.count("| met; 1 failed requests of `shift` |") == 2
    others = [visit(name, "azure") for name in NAMES[:3]]
    text = report.targets_table(Comparison([*others, visit("shift", "azure", requests=[FAILED])]))
    assert text.count("| - | **missed**; 1 failed requests of `shift` |") == 2


def test_files(tmp_path):
    pytest.importorskip("matplotlib")
    heading = {"command": "`x`", "contenders": {"shift": "--tp-size 2"}}
    text = report.write(tmp_path / "out", campaign(), heading, Limits(ttft=1.0))
    assert (tmp_path / "out/results.md").read_text() == text
    assert text.startswith("- command: `x`\n- contenders:\n  - shift: --tp-size 2\n")
    assert "Goodput: requests/s within TTFT 1 s." in text
    linked = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert sorted(linked) == sorted(f"plots/{p.name}" for p in (tmp_path / "out/plots").iterdir())
    with (tmp_path / "out/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4 * 8
    [row] = [r for r in rows if (r["contender"], r["workload"], r["round"]) == ("stock-dp", "azure", "2")]
    assert (float(row["ttft_p50"]), row["tp_steps"], row["x"]) == (pytest.approx(0.6), "", "")
    value = json.loads((tmp_path / "out/results.json").read_text())
    assert value["summary"]["shift"]["rate 2/s"]["tpot_p50"]["median"] == pytest.approx(0.016)
    assert (value["limits"]["ttft"], len(value["visits"]), value["heading"]) == (1.0, len(rows), heading)
    assert {t["met"] for t in value["targets"]} == {True, None}


def test_without_matplotlib_there_are_tables_and_the_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ShiftError, match="pip install matplotlib"):
        plots.write(Comparison(campaign(1)), tmp_path)
    text = report.write(tmp_path, campaign(1), {})
    assert "No plots: plots need matplotlib" in text
    assert "## azure" in text


def test_plots_are_png_and_named_safely(tmp_path):
    pytest.importorskip("matplotlib")
    visits = [visit(name, "bursty a/b|c:d", kind="bursty") for name in (*NAMES, "url:a/b|c")]
    paths = plots.write(Comparison([*campaign(1), *visits]), tmp_path)
    assert [p.name for p in paths] == [
        "01-rates.png", "02-prompt-lengths.png", "03-bursty.png", "04-bursty-timeline.png", "05-bursty-a-b-c-d.png",
        "06-bursty-a-b-c-d-timeline.png", "07-long-mix.png", "08-long-mix-timeline.png", "09-azure.png",
        "10-azure-timeline.png",
    ]  # fmt: skip
    for path in paths:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width == 1200
        assert 500 <= height <= 1400


def test_latency_against_throughput():
    pytest.importorskip("matplotlib")
    figure = plots.latency_against_throughput(Comparison(campaign()))
    ttft, tpot = figure.axes
    lines = {line.get_label(): line for line in ttft.get_lines() if line.get_label() in NAMES}
    assert list(lines) == list(NAMES)
    assert lines["stock-tp"].get_xdata() == pytest.approx([5055 / 40] * 2)  # 40 s in the middle round
    assert lines["shift"].get_ydata() == pytest.approx([480.0] * 2)
    assert lines["shift"].get_color() == plots.STYLES["shift"]["color"]
    assert [text.get_text() for text in ttft.texts] == ["0.5/s", "2/s"]
    assert (ttft.get_xlabel(), tpot.get_ylabel()) == ("prompt and output tokens/s", "TPOT p50, ms")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(NAMES)


def test_prompt_lengths_and_bars():
    pytest.importorskip("matplotlib")
    compared = Comparison(campaign())
    ttft, _, e2e = plots.by_prompt_length(compared).axes
    assert [label.get_text() for label in ttft.get_xticklabels()] == ["128", "4k"]
    assert e2e.get_ylabel() == "E2E p50, ms"
    line, _, [whisker] = ttft.containers[3]  # ours
    assert line.get_ydata() == pytest.approx([480.0] * 2)
    assert [tuple(segment[:, 1]) for segment in whisker.get_segments()] == [pytest.approx((240.0, 960.0))] * 2
    axes = plots.bars(compared, "azure").axes
    assert [ax.get_ylabel() for ax in axes[2:5]] == ["E2E p50, ms", "TTFT p99, ms", "TPOT p99, ms"]
    assert [bar.get_height() for bar in axes[1].patches] == pytest.approx([40.0, 20.0, 32.0, 16.0])


def test_timeline():
    pytest.importorskip("matplotlib")
    ours, other = visit(requests=[request(due=1.0), request(0.2, due=4.0), FAILED]), visit("stock-tp")
    ours.samples[5] = replace(ours.samples[5], steps={Mode.TP: 40, Mode.SP: 120})  # as in the sample before: no steps
    arrivals, queue, modes, latency = plots.timeline(ours, other, plots.styles(NAMES)).axes
    assert sum(bar.get_height() * bar.get_width() for bar in arrivals.patches) == pytest.approx(3)
    assert [list(line.get_ydata()) for line in queue.get_lines()] == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    tp, sp = (patch.get_data() for patch in modes.patches)
    for share in (tp.values, sp.baseline):
        assert list(share) == pytest.approx([0.25] * 4 + [nan], nan_ok=True)  # 10 of 40 steps
    assert list(sp.values[:4]) == [1.0] * 4
    mine, theirs = latency.collections
    assert mine.get_offsets().tolist() == [[1.0, 0.1], [4.0, 0.2]]
    assert (len(mine.get_facecolors()), len(theirs.get_facecolors())) == (1, 0)
    assert [text.get_text() for text in latency.get_legend().get_texts()] == ["shift", "shift, failed", "stock-tp"]


def test_plots_of_odd_visits(tmp_path):
    pytest.importorskip("matplotlib")
    assert plots.write(Comparison([visit("shift", "saturated")]), tmp_path / "none") == []
    nothing = Comparison([visit(requests=[FAILED], samples=[]), visit("stock-tp", requests=[])])
    assert [p.name for p in plots.write(nothing, tmp_path)] == ["01-bursty-timeline.png"]
    single = visit("sp", "single 8", requests=[request(output=1)], x=8.0)
    rate = visit("sp", "rate 1/s", requests=[FAILED], x=1.0)
    assert [p.name for p in plots.write(Comparison([single, rate]), tmp_path)] == ["01-prompt-lengths.png"]


def test_every_contender_looks_different():
    names = [*NAMES, *(f"url:{i}" for i in range(8))]
    looks = plots.styles(names)
    assert len({(s["color"], s["marker"]) for s in looks.values()}) == len(names)
    assert looks["shift"] == plots.styles(["shift"])["shift"]
