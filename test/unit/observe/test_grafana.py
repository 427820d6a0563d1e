"""The Grafana dashboard: valid, laid out without overlaps, and asking for metrics that exist."""

from __future__ import annotations

import json
import re
from itertools import combinations

import pytest
from harness import REPO
from sglang_shift.observe.metrics import METRICS, PREFIX

FILE = REPO / "docs" / "grafana-dashboard.json"
DASHBOARD = json.loads(FILE.read_text())
PANELS = DASHBOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]
OF_SGLANG = {"sglang:time_to_first_token_seconds_bucket", "sglang:inter_token_latency_seconds_bucket"}


def exposed() -> dict[str, tuple[str, ...]]:
    """The labels of each series, by name."""
    names = {}
    for name, metric in METRICS.items():
        suffixes = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names |= {f"{PREFIX}{name}{suffix}": metric.labels for suffix in suffixes}
    return names


def test_the_dashboard_is_one_that_grafana_imports():
    assert DASHBOARD["schemaVersion"] >= 36 and DASHBOARD["title"] and DASHBOARD["uid"]
    assert "id" not in DASHBOARD, "an id of one Grafana means nothing in another"
    source, *queries = DASHBOARD["templating"]["list"]
    assert source["type"] == "datasource" and source["query"] == "prometheus" and source["name"] == "datasource"
    assert [variable["name"] for variable in queries] == ["model_name", "replica"]
    for asked in [p for p in PANELS if p["type"] != "row"] + queries:
        assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for query in queries:
        assert re.fullmatch(rf"label_values\({PREFIX}(\w+), (\w+)\)", query["definition"])[1] in METRICS


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_asks_for_metrics_and_labels_that_exist(query):
    series = re.findall(r"(sglang(?:_shift)?:\w+)\{([^}]*)\}", query)
    assert series and len(series) == query.count("sglang"), "every metric is selected by labels"
    for name, selectors in series:
        labels = set(re.findall(r"(\w+)=", selectors))
        assert "model_name" in labels
        if name in OF_SGLANG:
            assert labels == {"model_name"}
        else:
            assert labels <= {"model_name", "replica", *exposed()[name]}, name
        if name.endswith(("_total", "_bucket", "_sum", "_count")):
            assert re.search(rf"(rate|increase)\({name}\{{", query), "a counter means nothing without a rate"
    assert query.count("(") == query.count(")") and query.count("{") == query.count("}")


def test_every_metric_has_a_panel():
    asked = set(re.findall(rf"{PREFIX}\w+", " ".join(QUERIES)))
    for name, metric in METRICS.items():
        suffix = "_bucket" if metric.kind == "histogram" else ""
        assert f"{PREFIX}{name}{suffix}" in asked


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    places = [panel["gridPos"] for panel in PANELS]
    for a in places:
        assert a["x"] >= 0 and a["y"] >= 0 and a["w"] > 0 and a["h"] > 0 and a["x"] + a["w"] <= 24
    for a, b in combinations(places, 2):
        apart_across = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart_across or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)


def test_panels_say_what_they_show():
    for panel in PANELS:
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["description"].endswith(".") and panel["fieldConfig"]["defaults"]["unit"]
            refs = [target["refId"] for target in panel["targets"]]
            assert len(set(refs)) == len(refs) and all(target["legendFormat"] for target in panel["targets"])
