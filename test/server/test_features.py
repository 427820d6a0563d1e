"""SGLang's features in shift mode, with switches happening: same answers as without."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from harness import MIXED_CHUNKS, SMALL_CHUNKS, Answer
from prompts import assert_same_answers

VARIANTS = {
    "mixed chunks, overlap": MIXED_CHUNKS,
    "no overlap": (*SMALL_CHUNKS, "--disable-overlap-schedule"),
}
MARKS = {
    "mixed chunks, overlap": [pytest.mark.server(*MIXED_CHUNKS)],
    "no overlap": [pytest.mark.server, pytest.mark.full],
}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=MARKS[name]) for name in VARIANTS])
def server(request, reference, servers):
    return servers.get(*VARIANTS[request.param])


@pytest.fixture(autouse=True)
def both_modes(request):
    """Each test must have run steps of both modes."""
    server = request.getfixturevalue("server")
    before = server.state
    yield
    after = server.state
    assert all(after["steps"][mode] > before["steps"][mode] for mode in ("tp", "sp")), (before, after)
    assert after["switches"] > before["switches"]


def test_chunked_prefill_under_load(server, reference):
    assert_same_answers(server.generate_all(reference.prompts, 16), reference.answers[16])


def test_streaming(server, reference):
    i = 40
    body = {
        "input_ids": reference.prompts[i],
        "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
        "return_logprob": True,
        "stream": True,
    }
    server.flush_cache()
    chunks = []
    with requests.post(server.url + "/generate", json=body, stream=True, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                chunks.append(json.loads(line[6:]))
    assert len(chunks) > 1, "one event for all tokens is not streaming"
    assert_same_answers([Answer.of(chunks[-1])], [reference.answers[1][i]])


def test_input_logprobs(server, reference):
    """Every input token's logprob, checked by asking again for the part after a prefix."""
    ids = reference.prompts[44]
    server.flush_cache()
    whole = server.generate(ids, 1, logprob_start_len=0).meta["input_token_logprobs"]
    assert [token for _, token, _ in whole] == ids
    values = [logprob for logprob, _, _ in whole]
    assert values[0] is None and all(v < 0 for v in values[1:])
    # Independently: the logprob of the token after each prefix, asked for as an output.
    for cut in (1, 2, len(ids) // 2, len(ids) - 1):
        server.flush_cache()
        answer = server.generate(ids[:cut], 1, top_logprobs_num=1, token_ids_logprob=[ids[cut]])
        (logprob, token, _) = answer.meta["output_token_ids_logprobs"][0][0]
        assert token == ids[cut]
        assert abs(logprob - values[cut]) < 1e-4


def test_abort_in_mid_flight(server, reference):
    """Aborted requests end as aborted; the others are not disturbed."""
    prompts = reference.prompts[40:48]
    server.flush_cache()
    with ThreadPoolExecutor(16) as pool:
        doomed = [pool.submit(server.generate, ids[::-1], 2000, rid=f"doomed-{i}") for i, ids in enumerate(prompts)]
        others = [pool.submit(server.generate, ids) for ids in prompts]
        time.sleep(0.5)
        for i in range(len(prompts)):
            server.post("/abort_request", {"rid": f"doomed-{i}"})
        assert {f.result().meta["finish_reason"]["type"] for f in doomed} == {"abort"}
        assert_same_answers([f.result() for f in others], reference.answers[16][40:48])


def test_stop_string(server):
    server.flush_cache()
    text = "def read(self, path):\n    with open(path) as f:\n" * 3 + "        return"
    sampling = {"temperature": 0, "max_new_tokens": 48, "ignore_eos": True}
    whole = server.post("/generate", {"text": text, "sampling_params": sampling})["text"]
    stop = whole[len(whole) // 2 :][:3]
    answer = server.post("/generate", {"text": text, "sampling_params": {**sampling, "stop": [stop]}})
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_regex_grammar(server):
    server.flush_cache()
    pattern = r"[0-9]{3}-[0-9]{4}"
    text = "import re\n\nPHONE = re.compile(r'...')\nexample = '"
    sampling = {"temperature": 0, "max_new_tokens": 32, "regex": pattern}
    with ThreadPoolExecutor(4) as pool:
        bodies = [{"text": text + "#" * i, "sampling_params": sampling} for i in range(4)]
        answers = list(pool.map(lambda body: server.post("/generate", body), bodies))
    assert all(re.fullmatch(pattern, a["text"]) for a in answers), [a["text"] for a in answers]


def test_frontend_language(server):
    """`@sgl.function` with gen, fork and select against the running server."""
    import sglang as sgl

    @sgl.function
    def program(s):
        s += "import os\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n\n"
        s += "    def exists(self):\n        return "
        forks = s.fork(2)
        forks[0] += sgl.gen("body", max_tokens=4, temperature=0)
        forks[1] += sgl.gen("body", max_tokens=4, temperature=0)
        forks.join()
        s += forks[0]["body"] + "\nx = " + sgl.select("choice", ["None", "zebra crossing"])
        s.set_var("same", forks[0]["body"] == forks[1]["body"])

    server.flush_cache()
    state = program.run(backend=sgl.RuntimeEndpoint(server.url))
    assert state["same"]
    assert state["choice"] == "None"


@pytest.mark.server(*MIXED_CHUNKS)
@pytest.mark.full
@pytest.mark.parametrize("server", ["mixed chunks, overlap"], indirect=True)
def test_bench_serving(server, tmp_path):
    """SGLang's client. Its import takes most of the time."""
    server.flush_cache()
    out = tmp_path / "bench.jsonl"
    command = [
        sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--port", str(server.port),
        "--dataset-name", "random-ids", "--tokenize-prompt", "--num-prompts", "6", "--random-input-len", "200",
        "--random-output-len", "8", "--random-range-ratio", "1", "--output-file", str(out), "--disable-tqdm",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text().splitlines()[-1])
    assert result["completed"] == 6
    assert result["total_output_tokens"] == 6 * 8


def test_server_info_and_start_up_log(server):
    server.flush_cache()
    server.generate(list(range(100, 150)), 4)
    info = requests.get(server.url + "/server_info", timeout=60).json()
    fields = {"sp_size": 2, "enable_shift_parallel": True, "shift_policy": "tokens", "shift_threshold": 20}
    assert {name: info[name] for name in fields} == fields
    log = server.log.read_text(errors="replace")
    assert "TP0] sglang_shift: The policy is: SP for steps of more than 20 tokens, else TP." in log
    for rank in ("TP0", "TP1"):
        assert re.search(rf"{rank}\] sglang_shift: SP=2 x TP=1 .* 0 bytes beyond the base configuration's", log)
    for left_out in ("ShiftConfig(", "server_args=", "UserWarning", "Ignore import error", "TP1] Load weight begin"):
        assert left_out not in log, log


def test_profiler(server):
    """Starting and stopping a profile must not take the scheduler down."""
    server.post("/start_profile", {"num_steps": 2, "output_dir": str(server.log) + ".profile"})
    server.flush_cache()
    server.generate(list(range(100, 150)), 4)
