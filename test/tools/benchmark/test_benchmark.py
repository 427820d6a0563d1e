"""The benchmark: what it sends, to whom, and that it goes on where it was interrupted."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import psutil
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from sglang_shift.errors import ShiftError
from sglang_shift.simulate import traffic
from sglang_shift.tools.benchmark import command, environment, link, link_rate, options, report, watch
from sglang_shift.tools.benchmark.campaign import Campaign, Settings
from sglang_shift.tools.benchmark.client import Client
from sglang_shift.tools.benchmark.contenders import parse_contender, parse_contenders
from sglang_shift.tools.benchmark.figures import Comparison, Limits
from sglang_shift.tools.benchmark.records import Visits
from sglang_shift.tools.benchmark.workloads import Workload, prompt_ids
from sglang_shift.tools.servers import Failure, free_port, launch

CONTEXT = 4096


def plan(*words: str):
    return options.plan(options.parse(list(words)), CONTEXT)


class TestWorkloads:
    def test_single_requests_that_fit_the_context(self):
        made = plan("--workloads", "single", "--lengths", "100", "4000", "5000", "--singles", "3").workloads(1.0)
        assert [(w.name, w.x, len(w.requests), w.concurrency) for w in made] == [
            ("single 100", 100, 3, 1), ("single 4000", 4000, 3, 1),
        ]  # fmt: skip

    def test_the_capacity_is_the_unit_of_rates(self):
        planned = plan("--workloads", "rate", "--rates", "0.5", "2", "--rate-requests", "400")
        saturated = planned.saturated()
        per_second = 1000 * len(saturated.requests) / saturated.tokens
        slow, fast = planned.workloads(1000.0)
        assert (slow.x, fast.x) == pytest.approx((0.5 * per_second, 2 * per_second))
        assert len(fast.requests) / fast.requests[-1].time == pytest.approx(fast.x, rel=0.15)
        assert {r.time for r in saturated.requests} == {0.0}

    def test_bursts_on_a_stream(self):
        [made] = plan("--workloads", "bursty", "--burst", "30", "--bursts", "2").workloads(1000.0)
        times = [r.time for r in made.requests]
        assert sorted(times) == times
        assert sorted(times.count(t) for t in set(times))[-2:] == [30, 30]
        assert len(times) > 60

    def test_rare_long_prompts(self):
        words = ("--workloads", "long-mix", "--long-every", "4", "--mix-requests", "12", "--prompt", "10", "20",
                 "--output", "5", "9", "--mix-rate", "0.5")  # fmt: skip
        [made] = plan(*words).workloads(100.0)
        long = [r.prompt for r in made.requests if r.prompt > 20]
        assert long == [CONTEXT - 9] * 3, "as long as the context allows"
        assert made.tokens / made.requests[-1].time == pytest.approx(50.0)

    def test_streams_and_the_prompts_that_arrive_beside_them(self):
        words = ("--workloads", "long-prompts", "--streams", "3", "--stream-output", "99", "--arriving", "50", "60",
                 "--arriving-requests", "40", "--arriving-rate", "0.5", "--prompt", "10", "20", "--output", "5",
                 "9")  # fmt: skip
        [made] = plan(*words).workloads(100.0)
        streams, arriving = made.requests[:3], made.requests[3:]
        assert {(r.time, r.prompt, r.output) for r in streams} == {(0.0, 10, 99)}
        assert len(arriving) == 40
        assert all(50 <= r.prompt <= 60 and 5 <= r.output <= 9 for r in arriving)
        tokens = sum(r.prompt + r.output for r in arriving)
        assert tokens / arriving[-1].time == pytest.approx(50.0)

    def test_a_closed_loop_ends_after_its_time(self):
        words = ("--workloads", "closed-loop", "--clients", "7", "--closed-seconds", "40", "--prompt", "9", "9")
        [made] = plan(*words, "--output", "1", "1").workloads(100.0)
        assert (made.concurrency, made.window, made.stop, made.groups) == (7, (10.0, 40.0), 40.0, ())
        assert len(made.requests) == 7 + 4 * 40 * 10, "more than the capacity allows, so that it never runs dry"
        assert {r.time for r in made.requests} == {0.0}

    def test_a_share_of_prompts_that_no_replica_holds(self):
        words = ("--workloads", "mixed-lengths", "--kv-tokens", "2000", "--tp-size", "4", "--long-shares", "0", "0.005",
                 "0.02", "--prompt", "20", "20", "--output", "5", "5", "--mixed-rate", "0.5", "--mixed-seconds", "100",
                 "--drain", "7")  # fmt: skip
        none, rare, some = plan(*words).workloads(500.0)
        assert [w.name for w in (none, rare, some)] == [f"mixed-lengths {n}%" for n in ("0", "0.5", "2")]
        assert len(rare.requests) == 1000, "half of the capacity of 500 tokens/s, for 100 s, of 25 tokens each"
        assert (rare.window, rare.stop) == ((pytest.approx(100 / 6), pytest.approx(100)), pytest.approx(107))
        assert none.groups == ()
        for made, count in ((rare, 5), (some, 20)):
            places = [i for i, r in enumerate(made.requests) if r.prompt > 500]
            assert len(places) == count
            assert {b - a for a, b in pairwise(places)} == {1000 // count}
            assert all(600 <= made.requests[i].prompt <= 1000 for i in places), "1.2 replicas to half of all"
            assert [i for i, group in enumerate(made.groups) if group == "long"] == places
            assert [r.time for r in made.requests] == [r.time for r in none.requests]

    def test_a_day_is_idle_then_a_ramp_then_a_burst(self):
        words = ("--workloads", "day", "--kv-tokens", "2000", "--tp-size", "2", "--prompt", "20", "20", "--output", "5",
                 "5", "--day-seconds", "80", "--day-idle", "0.1", "--day-peak", "1", "--burst", "30",
                 "--day-long-share", "0.01")  # fmt: skip
        [made] = plan(*words).workloads(250.0)
        times = {group: [r.time for r, g in zip(made.requests, made.groups, strict=True) if g == group]
                 for group in ("idle", "ramp", "burst", "long")}  # fmt: skip
        assert times["burst"] == [60.0] * 30
        assert {round(b - a, 6) for a, b in pairwise(times["idle"])} == {1.0, 41.0}
        assert min(times["ramp"]) > 20 and max(times["ramp"]) == 60
        middle = sum(time < 40 for time in times["ramp"])
        assert 0.2 < middle / len(times["ramp"]) < 0.4, "more and more arrive"
        assert len(times["long"]) == 2 and made.stop == 80 + 20

    def test_long_prompts_need_a_size(self, capsys):
        with pytest.raises(SystemExit):
            options.parse(["--workloads", "mixed-lengths"])
        assert "need --kv-tokens or --long-prompt" in capsys.readouterr().err
        assert plan("--workloads", "day", "--long-prompt", "70", "90").sizes.long_prompt == (70, 90)

    def test_a_trace_fits_a_small_pool(self, tmp_path):
        file = tmp_path / "a.csv"
        rows = "".join(f"2023-11-16 18:17:0{i}.0,{1000 * (i + 1)},{100 * (i + 1)}\n" for i in range(4))
        file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
        words = ("--workloads", "--azure", str(file), "--kv-tokens", "880", "--tp-size", "4", "--trace-fit", "0.5")
        [made] = plan(*words).workloads(100.0)
        assert [(r.prompt, r.output) for r in made.requests] == [(100, 10), (200, 20), (300, 30), (400, 40)]
        assert list(made.groups) == ["short", "short", "long", "long"], "a replica holds 220 tokens"

    def test_a_trace_at_a_load_or_a_speed(self, tmp_path):
        rows = "".join(f"2023-11-16 18:17:{i:02}.0,{1000 + i},20\n" for i in range(50))
        file = tmp_path / "a.csv"
        file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
        words = ("--workloads", "--azure", str(file), "--azure-window", "10", "31", "--azure-length", "0.1")
        [at_load] = plan(*words, "--trace-load", "0.5").workloads(200.0)
        assert [r.prompt for r in at_load.requests][:2] == [101, 101]
        assert len(at_load.requests) == 31
        assert at_load.tokens / at_load.requests[-1].time == pytest.approx(100.0)
        [faster] = plan(*words, "--trace-speed", "4").workloads(200.0)
        assert faster.requests[-1].time == pytest.approx(30 / 4)
        with pytest.raises(ShiftError, match=r"no request of .* arrives"):
            plan(*words[:3], "--azure-window", "100", "10")
        with pytest.raises(ShiftError, match="cannot be read"):
            plan("--mooncake", str(file))

    def test_prefixes_are_shared_as_in_the_trace(self, tmp_path):
        file = tmp_path / "m.jsonl"
        rows = [([0, 1, 2], 1500), ([0, 1, 3], 1500), ([0, 4], 1100)]
        file.write_text("".join(
            json.dumps({"timestamp": 0, "input_length": n, "output_length": 4, "hash_ids": ids}) + "\n"
            for ids, n in rows
        ))  # fmt: skip
        [made] = plan("--workloads", "--mooncake", str(file), "--mooncake-length", "0.25").workloads(1.0)
        a, b, c = (prompt_ids(r, i, "7", 4096) for i, r in enumerate(made.requests))
        assert [len(ids) for ids in (a, b, c)] == [375, 375, 275]
        assert a[:256] == b[:256] and a[256:] != b[256:], "two blocks of 512, a quarter of each"
        assert a[:128] == c[:128] and a[128:256] != c[128:256]
        assert len(set(a[256:]) & set(c[256:])) < 10, "what no block covers is the request's own"
        assert prompt_ids(made.requests[0], 0, "7", 4096) == a != prompt_ids(made.requests[0], 0, "8", 4096)
        assert min(a + b + c) >= 256 and max(a + b + c) < 4096

    def test_no_prefix_by_accident(self):
        request = traffic.Request(0, 50, 1)
        assert prompt_ids(request, 0, "1", 4096)[0] != prompt_ids(request, 1, "1", 4096)[0]


class TestContenders:
    def test_flags(self):
        assert parse_contender("stock-tp", 4).flags == ("--tp-size", "4")
        assert parse_contender("sp", 4, sp_size=2).flags == ("--tp-size", "4", "--sp-size", "2")
        assert parse_contender("shift:tokens", 2).flags[-2:] == ("--shift-policy", "tokens")
        assert parse_contender("shift:my.module:Policy", 2).flags[-1] == "my.module:Policy"
        assert parse_contender("sarathi:512", 4).flags == (
            "--tp-size", "4", "--enable-mixed-chunk", "--chunked-prefill-size", "512",
        )  # fmt: skip
        assert parse_contender("tbt:100", 2).flags[-3:] == ("--enable-shift-parallel", "--shift-tbt-target", "100")

    def test_replicas_share_the_memory_of_the_pool(self):
        assert parse_contender("stock-dp", 4, kv_tokens=1000).flags == (
            "--tp-size", "1", "--dp-size", "4", "--max-total-tokens", "250",
        )  # fmt: skip
        assert parse_contender("stock-tp", 4, kv_tokens=1000).flags[-1] == "1000"
        assert (parse_contender("stock-dp", 4).ranks, parse_contender("sp", 4).ranks) == (1, 4)
        assert parse_contender("stock-dp", 4).busy_loop == "sglang::data_parallel_controller"
        assert {parse_contender(name, 4).busy_loop for name in ("stock-tp", "sp", "shift")} == {None}

    def test_instances(self):
        flags = ("--tp-size", "4", "--instances", "2", "--enable-shift-parallel")
        assert parse_contender("instances:2", 4).flags == flags
        made = parse_contender("instances:4:paper", 4, kv_tokens=1000)
        assert made.flags[-4:] == ("--instance-policy", "paper", "--max-total-tokens", "1000")
        assert (made.ranks, made.levels) == (4, (1, 2, 4))
        assert parse_contender("instances:2", 8).levels == (4, 8)

    @pytest.mark.parametrize(
        ("words", "match"),
        [(["instances"], "instances:N"), (["instances:3"], "power of two that divides 2"), (["instances:4"], "divides"),
         (["instances:2:now"], "the policy is none of fixed"),
         (["fast"], "none of stock-tp"), (["sp:tokens"], "none of"), (["shift:nope"], "the policy is none of"),
         (["tbt"], "tbt:MS"), (["sarathi:0"], "sarathi:TOKENS"), (["sarathi:many"], "sarathi:TOKENS"),
         (["x=ftp://a"], "URL of http"), (["=http://a"], "NAME=URL"), (["sp", "sp"], "named twice")],
    )  # fmt: skip
    def test_wrong_words(self, words, match):
        with pytest.raises(ShiftError, match=match):
            parse_contenders(words, 2)


@pytest.mark.parametrize("words", [
    ["--rounds", "0"], ["--prompt", "9", "3"], ["--rates", "0"], ["--workloads", "x"], ["--link-rate", "-1"],
])  # fmt: skip
def test_wrong_options(words, capsys):
    with pytest.raises(SystemExit):
        options.parse(words)
    assert words[0] in capsys.readouterr().err


def test_errors_are_one_sentence(tmp_path, capsys):
    assert command.main(["--report", "--out", str(tmp_path)]) == 2
    assert "holds no visits" in capsys.readouterr().err
    assert command.main(["--contenders", "nobody", "--out", str(tmp_path)]) == 2
    assert "'nobody' is none of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 64}}, (262_208, 131_072)),
        ({"model_type": "llama", "vocab_size": 100, "max_position_embeddings": 77, "text_config": None}, (100, 77)),
    ],
)
def test_what_workloads_need_to_know_of_a_model(content, expected, tmp_path):
    """Published Gemma 3 models with images leave out what has a default."""
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = environment.describe_model(str(tmp_path))
    assert (model["vocabulary"], model["context"]) == expected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"model_type": "mamba", "vocab_size": 5}, "has no max_position_embeddings; give the model of a decoder"),
        ({"model_type": "unheard-of"}, r"cannot be read \(.*unheard-of.*\); give another model"),
    ],
)
def test_a_model_without_what_workloads_need(content, problem, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ShiftError, match=f"--model-path {tmp_path}: its configuration {problem}") as error:
        environment.describe_model(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_campaign_keeps_its_link(tmp_path, monkeypatch):
    """What a rank computes is never measured alike twice; visits at two rates are not to be compared."""
    rates = iter([5e8, 6e8, 7e8])
    monkeypatch.setattr(link, "check", lambda: None)
    monkeypatch.setattr(link_rate, "choose_rate", lambda *_: SimpleNamespace(rate=next(rates), text="derived"))

    def rate(*words: str) -> float:
        return command._link(options.parse([*words, "--kv-tokens", "9", "--out", str(tmp_path)]), "model")[0]

    assert rate("--link", "llama-70b") == rate("--link", "llama-70b") == 5e8
    assert rate("--link", "llama-70b", "--link-rate", "1e9") == 1e9
    assert rate("--link", "qwen-32b") == 6e8
    assert rate("--link", "qwen-32b", "--dtype", "float32") == rate("--link", "qwen-32b", "--dtype", "float32") == 7e8


def test_metrics_of_all_makers():
    text = (
        '# TYPE sglang:num_queue_reqs gauge\nsglang:num_queue_reqs{dp_rank="0"} 3\n'
        'sglang:num_queue_reqs{dp_rank="1"} 4\n'
        "# TYPE sglang_shift:steps counter\n"
        'sglang_shift:steps_total{mode="tp"} 7\n'
    )
    assert watch.read_metrics(text) == {"sglang:num_queue_reqs": [3, 4], "sglang_shift:steps_total{tp}": [7]}


class FakeServer:
    """What the client uses of SGLang's API; counts what it is asked."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.fail = 0  # fails from this prompt on, where not 0
        self.together = 1  # tokens of a delivery
        self.longest = 10**9  # tokens of the longest prompt that it takes
        self.refusal = ""  # the text of its answer to a longer prompt
        self.pause = 0.01  # seconds between tokens
        self.aborts: list[dict] = []
        self.instances = {"epoch": 0, "instances": [{"first": 0, "level": 2}], "last": []}
        self.app = FastAPI()
        self.app.post("/generate")(self.generate)
        self.app.get("/get_model_info")(lambda: {"model_path": "x"})
        self.app.get("/health")(lambda: {})
        self.app.post("/flush_cache")(lambda: "flushed")
        self.app.post("/abort_request")(self.abort)
        self.app.get("/shift/instances")(lambda: self.instances)
        self.app.get("/metrics", response_class=PlainTextResponse)(lambda: "sglang:token_usage 0.25\n")
        self.port = free_port()
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=self.port, log_level="error"))
        threading.Thread(target=self.server.run, daemon=True).start()
        while not self.server.started:
            time.sleep(0.02)

    async def generate(self, request: Request):
        body = await request.json()
        self.prompts.append(body["input_ids"])
        if self.fail and len(self.prompts) >= self.fail:
            return PlainTextResponse("no more", status_code=500)
        if len(body["input_ids"]) > self.longest:
            if not body.get("stream"):
                return PlainTextResponse("too long", status_code=400)
            meta = {"prompt_tokens": 1, "completion_tokens": len(self.refusal)}  # as SGLang does
            answer = {"text": self.refusal, "meta_info": meta}
            return StreamingResponse(iter([f"data: {json.dumps(answer)}\n\n".encode(), b"data: [DONE]\n\n"]))

        async def answer():
            for n in range(1, body["sampling_params"]["max_new_tokens"] + 1, self.together):
                await asyncio.sleep(self.pause)
                meta = {"prompt_tokens": len(body["input_ids"]), "completion_tokens": n, "cached_tokens": 3}
                yield f"data: {json.dumps({'text': 'x' * n, 'meta_info': meta})}\n\n".encode()
            yield b"data: [DONE]\n\n"

        return StreamingResponse(answer())

    async def abort(self, request: Request):
        self.aborts.append(await request.json())


@pytest.fixture
def fake():
    server = FakeServer()
    yield server
    server.server.should_exit = True


def campaign(tmp_path, fake, **facts) -> Campaign:
    words = ["--workloads", "single", "saturated", "--lengths", "20", "--singles", "2", "--single-output", "3",
             "--saturated", "3", "--prompt", "5", "9", "--output", "2", "4"]  # fmt: skip
    settings = Settings(tmp_path, 2, [], False, None, 4096, "default", 30, 0, facts)
    names = [f"a=http://127.0.0.1:{fake.port}", f"b=http://127.0.0.1:{fake.port}"]
    return Campaign(plan(*words), parse_contenders(names, 2), settings)


def test_the_gap_of_tokens_that_come_together(fake):
    fake.together = 3
    client = Client(f"http://127.0.0.1:{fake.port}", "sglang", "default", 4096, 30)
    [record] = client.run(Workload("one", "single", [traffic.Request(0.0, 5, 7)]), seed=1)
    assert (len(record.itl), len(record.gaps)) == (6, 2)
    assert sum(record.gaps) == pytest.approx(sum(record.itl), abs=1e-5)
    assert record.gaps[0] == pytest.approx(3 * record.itl[0], abs=1e-5)
    fake.together = 1
    [record] = client.run(Workload("one", "single", [traffic.Request(0.0, 5, 7)]), seed=1)
    assert record.gaps == record.itl
    assert len(record.itl) == 6


@pytest.mark.parametrize("text", ["", "x", "xy"])
def test_requests_that_a_server_refuses_are_rejected(fake, text):
    fake.longest, fake.refusal = 10, text
    client = Client(f"http://127.0.0.1:{fake.port}", "sglang", "default", 4096, 30)
    requests = [traffic.Request(0.0, n, 2) for n in (5, 50, 9)]
    records = client.run(Workload("w", "rate", requests, groups=("short", "long", "short")), seed=1)
    assert [(r.rejected, r.failed, r.group) for r in records] == [
        (False, False, "short"), (True, False, "long"), (False, False, "short"),
    ]  # fmt: skip
    assert records[1].error == "rejected: too long"


def test_a_process_gets_the_lowest_priority(tmp_path):
    code = "import subprocess; subprocess.run(['sleep', '60'])"
    server = launch([([sys.executable, "-c", code], {})], "http://127.0.0.1:1", tmp_path / "log")
    try:
        deadline = time.monotonic() + 30
        while not (children := psutil.Process(server.processes[0].pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.lower_priority("another")
        assert children[0].nice() == psutil.Process().nice()
        server.lower_priority("60")
        assert children[0].nice() == 19
    finally:
        server.stop()


def test_a_workload_that_stops(fake):
    fake.pause = 0.2
    client = Client(f"http://127.0.0.1:{fake.port}", "sglang", "default", 4096, 30)
    requests = [traffic.Request(0.0, 5, 2 if i < 2 else 1000) for i in range(9)]
    records = client.run(Workload("w", "closed-loop", requests, concurrency=2, stop=1.5), seed=1)
    assert [r.unfinished for r in records] == [False, False, True, True], "the others were never sent"
    assert not [r for r in records if r.failed]
    assert fake.aborts == [{"abort_all": True}]


def test_changes_of_instances_are_noted_once(fake):
    def change(epoch: int, level: int):
        return {"epoch": epoch, "first": 0, "ranks": 2, "level": level, "ok": True, "phases": {"exchange": 0.5},
                "bytes_sent": 7, "tokens_recomputed": 1, "why": "x", "time": 1.0}  # fmt: skip

    fake.instances["last"] = [change(1, 2)]
    watched = watch.InstanceWatch(f"http://127.0.0.1:{fake.port}")
    assert watched.levels() == {2: 2} and watched.changes == []
    fake.instances["epoch"] = 2  # it begins with the next change, whose report is not there yet
    watched.levels()
    fake.instances |= {"last": [change(1, 2), change(2, 1)], "instances": [{"first": i, "level": 1} for i in (0, 1)]}
    assert watched.levels() == watched.levels() == {1: 2}
    assert [(c.epoch, c.merges, c.phases) for c in watched.changes] == [(2, False, {"exchange": 0.5})]
    assert watch.InstanceWatch(f"http://127.0.0.1:{fake.port}/none").levels() == {}


def test_a_campaign_is_measured_once(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("sglang_shift.tools.benchmark.campaign.SETTLE_S", 0.0)
    visits = campaign(tmp_path, fake, model="m").run()
    assert {(v.contender, v.workload, v.round) for v in visits} == {
        (c, w, r) for c in "ab" for w in ("single 20", "saturated") for r in (1, 2)
    }
    single = next(v for v in visits if v.workload == "single 20")
    assert [(r.prompt, r.output, r.cached, len(r.itl)) for r in single.requests] == [(20, 3, 3, 2)] * 2
    assert single.requests[1].sent >= single.requests[0].end, "one at a time"
    assert 0 < single.requests[0].ttft < single.requests[0].latency <= single.seconds
    first, second = ([v for v in visits if v.contender == c and v.workload == "saturated"] for c in "ab")
    assert [len(v.requests) for v in (*first, *second)] == [3] * 4

    asked = len(fake.prompts)
    kept = (tmp_path / "visits.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "visits.jsonl").write_text("".join(kept[:-2]) + kept[-2][:50])
    assert len(campaign(tmp_path, fake, model="m").run()) == len(visits)
    assert len(fake.prompts) - asked == sum(len(v.requests) + 1 for v in Visits(tmp_path / "visits.jsonl").read()[-2:])
    with pytest.raises(ShiftError, match=r"other settings \(model\)"):
        campaign(tmp_path, fake, model="another")


def test_prompts_are_the_same_for_all_contenders(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("sglang_shift.tools.benchmark.campaign.SETTLE_S", 0.0)
    campaign(tmp_path, fake).run()
    singles = [tuple(ids) for ids in fake.prompts if len(ids) == 20]
    measured = {ids: singles.count(ids) for ids in singles}
    assert sorted(measured.values())[-4:] == [2, 2, 2, 2], "two prompts in two rounds, each to a and to b"


def test_a_contender_that_rejects_a_whole_workload(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("sglang_shift.tools.benchmark.campaign.SETTLE_S", 0.0)
    fake.longest = 10  # the requests of "single 20" are longer
    visits = campaign(tmp_path, fake).run()
    rejected = [v for v in visits if v.workload == "single 20"]
    assert [(v.seconds, [r.rejected for r in v.requests]) for v in rejected] == [(0.0, [True, True])] * 4
    assert {v.workload for v in visits} == {"single 20", "saturated"}
    found = Comparison(visits).figures(rejected[0])
    assert (found["rejected"], found["errors"], found["total_tokens_per_s"]) == (2, 0, 0.0)
    assert "rejected requests" in report.write(tmp_path, visits, {"command": "x"}, Limits())


def test_no_capacity(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("sglang_shift.tools.benchmark.campaign.SETTLE_S", 0.0)
    fake.longest = 4
    with pytest.raises(ShiftError, match="a answered no request of the saturated workload"):
        campaign(tmp_path, fake).run()


def test_the_context_of_the_servers(tmp_path, monkeypatch):
    """Longer prompts would all be rejected."""
    monkeypatch.setattr("sglang_shift.tools.benchmark.environment.describe_model",
                        lambda _: {"context": 4096, "vocabulary": 4096})  # fmt: skip
    monkeypatch.setattr(Campaign, "run", lambda self: found.append(self.plan.context))
    found = []
    for flags in ([], ["--log-level", "info", "--context-length", "1000"], ["--context-length=2000"]):
        out = tmp_path / str(len(found))
        out.mkdir()
        command.measure(options.parse(["--out", str(out), "--", *flags]), "model", "the command")
    assert found == [4096 - 8, 1000 - 8, 2000 - 8]
    with pytest.raises(
        ShiftError, match=r"--context-length many: .*invalid int value: 'many'; give a number of tokens"
    ):
        options.context_length(["--context-length", "many"])


def test_no_workload_repeats_the_prompts_of_another(fake, tmp_path, monkeypatch):
    """A server of another maker keeps its prefix cache, and would find there what it has seen."""
    monkeypatch.setattr("sglang_shift.tools.benchmark.campaign.SETTLE_S", 0.0)
    measured = campaign(tmp_path, fake)
    measured.contenders = measured.contenders[:1]
    sent, run = [], Client.run

    def note(client, workload, seed, *more):
        before = len(fake.prompts)
        records = run(client, workload, seed, *more)
        if workload.name != "warm-up":
            sent.extend(tuple(ids[:4]) for ids in fake.prompts[before:])
        return records

    monkeypatch.setattr(Client, "run", note)
    measured.run()
    assert len(sent) == 2 * 3 + 2 * (2 + 3), "the capacity, and two workloads in two rounds"
    assert len({*sent}) == len(sent)


def test_a_cache_that_cannot_be_emptied(fake, tmp_path):
    """Visits of a server of the campaign would not be comparable. Another server may be busy."""

    class Busy:
        def flush(self):
            raise Failure("the server did not flush its cache")

    made, server = campaign(tmp_path, fake), Busy()
    other, ours = made.contenders[0], parse_contender("tp", 2)
    made._client(other, SimpleNamespace(url=other.url))
    made._empty_cache(server, other)
    with pytest.raises(Failure, match="did not flush"):
        made._empty_cache(server, ours)


def test_requests_that_fail_are_kept_as_such(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sglang_shift.tools.benchmark.campaign.SETTLE_S", 0.0)
    fake.fail = 10
    with pytest.raises(Failure, match=r"no request of .* was answered"):
        campaign(tmp_path, fake).run()
    assert "a request failed: Internal Server Error: no more" in capsys.readouterr().err
