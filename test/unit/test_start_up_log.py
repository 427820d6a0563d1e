"""What the start-up log leaves out is exactly what is listed, and nothing when the user asks for all of it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sglang
from sglang_shift import start_up_log
from sglang_shift.start_up_log import (
    CPU_MESSAGES,
    CPU_WARNINGS,
    LAUNCHER_MESSAGES,
    NOT_ON_CPU,
    SAME_ON_ALL_RANKS,
    leave_out,
    leave_out_cpu,
    quiet_other_ranks,
)

SOURCES = Path(sglang.__file__).parent.parent
ALL_MESSAGES = {**CPU_MESSAGES, **LAUNCHER_MESSAGES}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Loggers and environment as they were; the root logger is at level info."""
    monkeypatch.delenv("SGLANG_LOGGING_CONFIG_PATH", raising=False)
    monkeypatch.setenv("PYTHONWARNINGS", "")
    for name in ALL_MESSAGES:
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
    logging.getLogger().manager._clear_cache()
    yield
    monkeypatch.undo()
    logging.getLogger().manager._clear_cache()


@pytest.mark.parametrize(("module", "beginning"), [*ALL_MESSAGES.items(), *CPU_WARNINGS.items()])
def test_sglang_has_each_message_where_the_list_says(module, beginning):
    source = (SOURCES / module.replace(".", "/")).with_suffix(".py").read_text()
    assert f'"{beginning}' in source


def test_the_models_that_a_cpu_cannot_import_are_sglangs():
    assert all((SOURCES / "sglang/srt/models" / f"{name}.py").exists() for name in NOT_ON_CPU)


@pytest.mark.parametrize(("module", "beginning"), ALL_MESSAGES.items())
def test_only_the_listed_message_of_a_module_is_left_out(module, beginning, caplog):
    leave_out(ALL_MESSAGES)
    logger = logging.getLogger(module)
    logger.warning("%s and so on", beginning)
    logger.warning("another warning, which quotes %s", beginning)
    logging.getLogger(module + "_2").warning("%s of another module", beginning)
    assert [record.name for record in caplog.records] == [module, module + "_2"]


@pytest.mark.parametrize("how", ["debug", "own configuration"])
def test_nothing_is_left_out_if_the_user_says_so(how, caplog, monkeypatch):
    leave_out(ALL_MESSAGES)
    if how == "debug":
        caplog.set_level(logging.DEBUG)
    else:
        monkeypatch.setenv("SGLANG_LOGGING_CONFIG_PATH", "mine.json")
    for module, beginning in ALL_MESSAGES.items():
        logging.getLogger(module).warning(beginning)
    with quiet_other_ranks(False):
        logging.getLogger("sglang.srt").info("a message")
    assert len(caplog.records) == len(ALL_MESSAGES) + 1


def warned(module: str, text: str, options: str) -> bool:
    """Whether a process with these ``PYTHONWARNINGS`` shows a warning of a module."""
    code = f"import warnings; exec({f'warnings.warn({text!r})'!r}, {{'warnings': warnings, '__name__': {module!r}}})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONWARNINGS": options},
        capture_output=True,
        text=True,
        check=True,
    )
    return text in done.stderr


def test_processes_started_later_leave_out_the_listed_warnings_only(monkeypatch):
    monkeypatch.setattr(start_up_log.warnings, "filterwarnings", lambda *args, **kwargs: None)
    leave_out_cpu()
    leave_out_cpu()
    options = os.environ["PYTHONWARNINGS"]
    assert options.count("ignore") == len(CPU_WARNINGS)
    for module, text in CPU_WARNINGS.items():
        assert warned(module, text, "") and not warned(module, text, options)
    assert warned(module, "It is deprecated.", options)
    assert warned("user.module", text, options)


def test_the_users_filters_of_warnings_come_first(monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    leave_out_cpu()
    module, text = next(iter(CPU_WARNINGS.items()))
    assert warned(module, text, os.environ["PYTHONWARNINGS"])


@pytest.mark.parametrize("logs", [True, False])
def test_a_quiet_rank_still_warns(logs, caplog):
    loggers = [logging.getLogger(name + ".part") for name in SAME_ON_ALL_RANKS]
    with quiet_other_ranks(logs):
        for logger in loggers:
            logger.info("the same on all ranks")
            logger.warning("a warning")
        logging.getLogger("sglang_shift.runtime").info("of this rank")
    for logger in loggers:
        logger.info("after the start")
    count = len(loggers)
    expected = ["the same on all ranks"] * count * logs + ["a warning"] * count
    expected += ["of this rank"] + ["after the start"] * count
    assert sorted(record.message for record in caplog.records) == sorted(expected)
