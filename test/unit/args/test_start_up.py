"""Start-up without a server: agreement between ranks, routing of `sglang serve`, the CPU platform."""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.server_args import ServerArgs
from sglang_shift.args.server_args import ShiftServerArgs
from sglang_shift.config import ShiftConfig
from sglang_shift.flags import FLAGS
from sglang_shift.platforms import cpu
from sglang_shift.runtime import agreement
from sglang_shift.runtime.agreement import difference
from sglang_shift.serve_backend import backend, has_shift_flag


def test_ranks_that_agree():
    assert difference(0, {"sglang": "0.5.23"}, 1, {"sglang": "0.5.23"}) is None


def test_a_difference_names_both_ranks_and_both_values():
    mine, theirs = {"--sp-size": 2, "torch": "2.14"}, {"--sp-size": 4, "torch": "2.14"}
    assert "--sp-size is 2 on rank 0 and 4 on rank 3" in str(difference(0, mine, 3, theirs))


@pytest.mark.parametrize("name", [field.name for field in fields(ShiftConfig)])
def test_every_setting_must_be_the_same_on_all_ranks(monkeypatch, name):
    monkeypatch.setattr(agreement, "get_model", lambda: SimpleNamespace(dtype="auto"))
    config = ShiftConfig(4, 2, True, "tokens")
    mine, theirs = agreement.statement(config), agreement.statement(replace(config, **{name: "another"}))
    assert "another on rank 1" in str(difference(0, mine, 1, theirs))


def test_every_flag_of_ours_is_a_field_and_is_routed_to_us():
    """What the table says of each flag is what the command line and the constructor have."""
    parser = argparse.ArgumentParser()
    ShiftServerArgs.add_cli_args(parser)
    stock = argparse.ArgumentParser()
    ServerArgs.add_cli_args(stock)
    stock_options = {option for action in stock._actions for option in action.option_strings}
    ours = {tuple(a.option_strings): a for a in parser._actions if not stock_options & {*a.option_strings}}
    assert set(ours) == {flag.options for flag in FLAGS}
    for flag in FLAGS:
        action = ours[flag.options]
        assert (action.dest, action.help, action.choices) == (flag.name, flag.help, list(flag.choices) or None)
        assert action.default is (False if flag.type is bool else None)
        assert all(has_shift_flag((option,)) for option in flag.options)
    assert set(ShiftServerArgs.__struct_fields__) - set(ServerArgs.__struct_fields__) == {flag.name for flag in FLAGS}


def test_every_setting_but_the_number_of_ranks_is_a_flag():
    assert {field.name for field in fields(ShiftConfig)} == {"world_size", *(flag.setting for flag in FLAGS)}


def test_the_arguments_reach_a_spawned_rank():
    given = {"tp_size": 2, "sp_size": "auto", "enable_shift_parallel": True, "shift_threshold": 7}
    args = ShiftServerArgs(model_path="there", **given)
    copy = pickle.loads(pickle.dumps(args))
    assert type(copy) is ShiftServerArgs and {name: getattr(copy, name) for name in given} == given
    assert copy.shift_exchange is None


def test_the_flags_are_known_without_sglang():
    """`sglang serve` looks at them at every start, also for stock SGLang."""
    program = (
        "import sys, sglang_shift.serve_backend as b; b.has_shift_flag(('m', '--tp-size', '2')); "
        "print([m for m in sys.modules if m.split('.')[0] in ('sglang', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("argv", "ours"),
    [
        (("--model-path", "m", "--sp-size", "2"), True),
        (("--model-path", "m", "--sp-size=2"), True),
        (("--enable-shift-parallel",), True),
        (("--model-path", "m", "--tp-size", "2"), False),
        ((), False),
    ],
)
def test_sglang_serve_routes_our_flags_to_us(argv, ours):
    assert has_shift_flag(argv) is ours


def test_sglang_serve_routes_a_config_file_with_our_flags_to_us(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("tp-size: 2\nsp-size: 2\n")
    assert has_shift_flag(("--config", str(config)))
    config.write_text("tp-size: 2\n")
    assert not has_shift_flag(("--config", str(config)))
    assert not has_shift_flag(("--config", str(tmp_path / "missing.yaml")))


def test_the_backend_is_registered():
    from sglang.cli.serve_backends import ServeBackendRegistry

    registered = ServeBackendRegistry({}).get("shift").backend
    assert registered == backend()


def test_the_platform_stays_out_of_the_way_of_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert cpu.activate() is None


def test_the_platform_leaves_sglangs_own_cpu_engine_alone(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert cpu.activate() == "sglang_shift.platforms.cpu:ShiftCpuPlatform"
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert cpu.activate() is None


@pytest.mark.parametrize(
    ("cores", "ranks", "threads", "binding"),
    [({0, 1}, 2, "1", "0|1"), ({0, 1}, 4, "1", "0|1|0|1"), ({0, 1, 2, 3}, 2, "2", "0,1|2,3"), ({4, 6}, 1, "2", "4,6")],
)
def test_cores_are_shared_out(monkeypatch, cores, ranks, threads, binding):
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: cores, raising=False)
    environment: dict[str, str] = {}
    monkeypatch.setattr(cpu.os, "environ", environment)
    cpu.share_cores(ranks)
    assert environment == {"OMP_NUM_THREADS": threads, "SGLANG_CPU_OMP_THREADS_BIND": binding}


def test_local_ranks_count_this_nodes_only():
    assert cpu.local_ranks(SimpleNamespace(dp_size=2, tp_size=8, pp_size=1, nnodes=4)) == 4
