from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

# Nothing may be fetched; set before transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Calibrations of these tests are no one else's.
os.environ["SGLANG_SHIFT_CACHE_DIR"] = tempfile.mkdtemp(prefix="sglang_shift_test_")

import pytest
from forked_server import ForkedPopen
from harness import Answer, Server, ServerPool
from prompts import prompts
from sglang_shift.tools import servers as launches

FLOAT32 = ("--dtype", "float32")
POOL = ServerPool()
# The modules without a server that take longest. They begin first, so that no process waits for one of them at the end.
LONG = ("test_models.py", "test_instance_levels.py", "test_instance_faults.py", "test_instance_likelihoods.py")

# The time (in seconds since 1970) from which no more tests of the full tier begin. CI sets it, because machines differ.
DEADLINE = "SGLANG_SHIFT_TEST_DEADLINE"
TOO_LATE = "the time for all tests was over"


def pytest_unconfigure():
    shutil.rmtree(os.environ["SGLANG_SHIFT_CACHE_DIR"], ignore_errors=True)


@pytest.hookimpl(trylast=True)  # pytest itself groups the parameters of a module's fixtures before
def pytest_collection_modifyitems(items):
    """Long modules come first. Tests whose marker names the same server run together: it is started once."""
    places = {}

    def place(entry):
        index, item = entry
        marker = item.get_closest_marker("server")
        long = LONG.index(item.path.name) if item.path.name in LONG else len(LONG)
        return long, places.setdefault(marker.args, index) if marker and marker.args else index

    items[:] = [item for _, item in sorted(enumerate(items), key=place)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Past the deadline only tests of the fast tier run, so that a slow machine still gives a result."""
    if item.get_closest_marker("full") and time.time() > float(os.environ.get(DEADLINE, "inf")):
        pytest.skip(TOO_LATE)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure shows the end of the server's log; a server that hung is not asked again."""
    report = yield
    if report.failed and "servers" in item.fixturenames and POOL.server is not None:
        report.sections.append((f"log of the server {' '.join(POOL.server.flags)}", POOL.server.tail()))
        if "from pytest-timeout" in str(call.excinfo.value):
            POOL.stop()
    # pytest-xdist sends reports as UTF-8, and some tests log text that is none.
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


def pytest_terminal_summary(terminalreporter):
    if late := sum(TOO_LATE in str(report.longrepr) for report in terminalreporter.getreports("skipped")):
        terminalreporter.write_line(f"{late} TESTS OF THE FULL TIER DID NOT RUN: {TOO_LATE}", yellow=True, bold=True)
    if Server.start_seconds:
        terminalreporter.write_line(
            f"{len(Server.start_seconds)} servers started, {sum(Server.start_seconds):.0f} s until they were ready"
        )


@pytest.fixture(autouse=True)
def environment():
    """Undo what a test leaves in the environment: resolving server arguments sets CPU bindings that servers inherit."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def servers():
    yield POOL
    POOL.stop()


@pytest.fixture
def forked_launches(monkeypatch, servers):
    """The servers that our tools start are forked, too. No other server runs beside them."""
    servers.stop()
    monkeypatch.setattr(launches, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": ForkedPopen}))


class Reference:
    """Answers of stock SGLang at TP=1 in float32, asked once."""

    def __init__(self, servers: ServerPool) -> None:
        server = servers.get(*FLOAT32, "--tp-size", "1")
        self.prompts = prompts()
        self.answers: dict[int, list[Answer]] = {n: server.generate_all(self.prompts, n) for n in (1, 16)}
        self.input_logprobs = [
            [entry[0] for entry in server.generate(ids, 1, logprob_start_len=0).meta["input_token_logprobs"][1:]]
            for ids in self.prompts[20::2]
        ]
        server.flush_cache()
        self.tokens_64 = [server.generate(ids, 64) for ids in self.prompts[::8]]


@pytest.fixture(scope="session")
def reference(servers):
    return Reference(servers)


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium, driven as scripts/screenshot.py does."""
    file = Path(__file__).parent.parent / "scripts" / "screenshot.py"
    spec = importlib.util.spec_from_file_location("screenshot", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    if (binary := script.find_chromium()) is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no Chromium on PATH")
        pytest.skip("no Chromium on PATH")
    with script.Browser(binary) as browser:
        yield browser


@pytest.fixture
def browser(chromium):
    """An empty tab. The test's page is closed after it, so that no later test sees its errors."""
    chromium.problems.clear()
    yield chromium
    chromium.command("Page.navigate", url="about:blank")
