"""The family of modes, what a step shows of it to a policy, and that a third mode needs no change elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from harness import REPO
from sglang_shift.modes import MODES, Mode, StepState


def test_a_mode_is_its_name():
    """It is a key of JSON objects and a value of flags as it is."""
    assert MODES == (Mode.TP, Mode.SP) == ("tp", "sp")
    assert {Mode.TP: 1}["tp"] == 1 and Mode.SP.name == "SP"


@pytest.mark.parametrize(
    ("padded", "whole"),
    [
        ({}, {Mode.TP: 5, Mode.SP: 5}),
        ({Mode.SP: 8}, {Mode.TP: 5, Mode.SP: 8}),
        ({Mode.TP: 6, Mode.SP: 8}, {Mode.TP: 6, Mode.SP: 8}),
        ({Mode.TP: 0}, {Mode.TP: 5, Mode.SP: 5}),
    ],
)
def test_a_step_has_its_padded_tokens_in_every_mode(padded, whole):
    step = StepState(5, padded=padded)
    assert step.padded == whole and step.padded_tokens == whole[Mode.TP]
    assert replace(step, previous_mode=Mode.TP).padded == whole
    assert hash(step) == hash(replace(step)), "as before, a step can be a key"


def test_a_third_mode_is_carried_through():
    """The checks of ``support/three_modes.py``, in a process in which the family has three members."""
    support = REPO / "test" / "support"
    path = os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "third_mode", "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [*command, str(support / "three_modes.py")],
        capture_output=True, text=True, check=False, cwd=REPO, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
