"""This pytest plugin is in the process of one check. It limits the time, and records the findings and the end."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from sglang_shift.tools.gpu_check.catalogue import MARKERS
from sglang_shift.tools.gpu_check.record import End, Record, one_line

RECORD = pytest.StashKey[Record]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options by which the parent process controls this one."""
    group = parser.getgroup("gpu-check")
    group.addoption("--record", type=Path, help="the file for what the check finds")
    group.addoption("--until", type=float, help="when its time is up, in seconds since the epoch")


def pytest_configure(config: pytest.Config) -> None:
    """Open the record, and let SIGTERM end the check.

    The signal raises an exception, so the ``finally`` blocks of the check run. They end what the check has started.
    """
    path, until = config.getoption("--record"), config.getoption("--until")
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    config.stash[RECORD] = Record(path.open("wb"), path.parent)
    timeouts = config.pluginmanager.hasplugin("timeout")

    def end(number: int, _: Any) -> None:
        # After this time pytest-timeout has already raised an exception in the check, and the check cleans up.
        if not (timeouts and time.time() >= until):
            sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Limit the check to the time that is left.

    This is less than the check's own limit, because the start of this process took some of the time.
    """
    for item in items:
        left = config.getoption("--until") - time.time()
        item.add_marker(pytest.mark.timeout(max(1.0, left), method="signal"), append=False)


@pytest.fixture
def record(pytestconfig: pytest.Config) -> Record:
    """Give a check the record for its findings."""
    return pytestconfig.stash[RECORD]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Fail a check that has recorded problems."""
    result = yield
    if problems := pyfuncitem.config.stash[RECORD].problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        pytest.fail(problems[0] + more, pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record how the check ended. The first phase that did not pass counts, or else the last phase."""
    report = yield
    if call.excinfo is not None or call.when == "teardown":
        late = report.failed and call.stop >= item.config.getoption("--until")
        reason = "" if call.excinfo is None else _reason(call.excinfo.value)
        item.config.stash[RECORD].end(End(report.outcome, reason, late))
    return report


def _reason(error: BaseException) -> str:
    has_message = isinstance(error, (pytest.fail.Exception, pytest.skip.Exception))
    return str(error) if has_message else one_line(error)
