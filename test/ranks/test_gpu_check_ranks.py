"""What the GPU check runs on groups of ranks: exchanges and links, each of which may fail without the others."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.distributed as dist
from sglang_shift.parallel.exchange.collective import CollectiveExchange
from sglang_shift.tools.gpu_check import attempts, exchange, links
from sglang_shift.tools.gpu_check.ranks import RankGroup, run_ranks
from sglang_shift.tools.gpu_check.record import Record
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("name", "text"), [("collective", "collective"), ("pipelined", "pipelined, 4 groups")])
def test_an_exchange_is_held_against_what_was_sent(name, text, ranks):
    rows = run_ranks(exchange.compare, ["cpu"] * ranks, "gloo", name)
    assert [row["rows"] for row in rows] == list(exchange.ROWS)
    assert all(row["eager_right"] and row["ranks"] == ranks and row["exchange"] == text for row in rows)


ROW = {"rows": 1024, "eager_right": True, "graph_right": False, "eager_us": 5.0}


class TestExchanges:
    """One that fails leaves the other, and what it is."""

    @pytest.fixture
    def record(self, monkeypatch):
        def ranks(function, devices, backend, name):
            if name == "flashinfer" and len(devices) == 2:
                raise ProcessRaisedException("\n\n-- Process 1\nTraceback\n  File\n    x()\nOSError: no NVML\n", 1, 2)
            return [{**ROW, "exchange": name}]

        monkeypatch.setattr(attempts, "run_ranks", ranks)
        monkeypatch.setattr(exchange.environment, "gpus", lambda: 4)
        return Record()

    def test_an_exception(self, record):
        exchange.check_several(record)
        assert [(row["group"], row["exchange"]) for row in record.rows] == [
            ("2 GPUs", "collective"), ("2 GPUs", "pipelined"),
            ("4 GPUs", "collective"), ("4 GPUs", "pipelined"), ("4 GPUs", "flashinfer"),
        ]  # fmt: skip
        assert record.problems == [
            "2 GPUs, collective, 1024 rows: wrong (graph)",
            "2 GPUs, pipelined, 1024 rows: wrong (graph)",
            "2 GPUs, flashinfer: OSError: no NVML",
            "4 GPUs, collective, 1024 rows: wrong (graph)",
            "4 GPUs, pipelined, 1024 rows: wrong (graph)",
            "4 GPUs, flashinfer, 1024 rows: wrong (graph)",
        ]

    def test_no_flashinfer(self, record, monkeypatch):
        monkeypatch.setitem(sys.modules, "flashinfer.comm.ulysses", None)
        exchange.check_several(record)
        (skipped,) = [note for note in record.notes if "skipped" in note]
        assert skipped.startswith("flashinfer: skipped: ModuleNotFoundError")
        assert {row["exchange"] for row in record.rows} == {"collective", "pipelined"}


def test_links_of_which_one_fails(monkeypatch):
    def ranks(function, devices, backend, operation):
        if operation == "all-reduce":
            raise ProcessExitedException("process 1 terminated with signal SIGSEGV", 1, 2, -11)
        if operation == links.SGLANG:
            return [{"skipped": "no peers"}]
        return [{"operation": operation, "bytes": 8, "us": 1.0}]

    monkeypatch.setattr(attempts, "run_ranks", ranks)
    monkeypatch.setattr(links.environment, "gpus", lambda: 2)
    record = Record()
    links.check(record)
    assert record.rows == [{"operation": "all-to-all", "bytes": 8, "us": 1.0}]
    assert record.problems == ["2 GPUs, all-reduce: process 1 terminated with signal SIGSEGV"]
    assert record.notes[0] == "2 GPUs, SGLang's all-reduce: skipped: no peers" and len(record.notes) == 2


def _failing(device: torch.device) -> None:
    # As where NCCL waits for graphs that the exception's traceback keeps.
    dist.destroy_process_group = lambda: os._exit(3)
    raise OSError("the first line\nthe second")


def test_a_rank_that_fails_says_why():
    record = Record()
    assert attempts.run_or_record_problem(record, "a part", _failing, ["cpu", "cpu"], "gloo") is None
    assert record.problems == ["a part: OSError: the first line the second"]


def _wrong_exchange(device: torch.device) -> list[bool]:
    class Wrong(CollectiveExchange):
        def scatter_heads(self, x, project, width):
            heads = super().scatter_heads(x, project, width)
            return heads + 1 if dist.get_rank() == 1 else heads

    return [
        exchange.Trip(kind(RankGroup()), 3, torch.float32, device).run_and_check()
        for kind in (CollectiveExchange, Wrong)
    ]


def test_an_exchange_that_is_wrong_on_another_rank():
    assert run_ranks(_wrong_exchange, ["cpu", "cpu"], "gloo") == [True, False]
