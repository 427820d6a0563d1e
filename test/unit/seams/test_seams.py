"""The seams: checked at start-up, fatal when something is off, and in place afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from sglang_shift.errors import SeamError
from sglang_shift.seams import check, digests, registry
from sglang_shift.seams.registry import Kind, Seam


def test_sources_are_those_this_package_was_written_against():
    check.check_sources()


def test_every_function_has_a_digest():
    without = [s.target for s in registry.seams() if s.target not in digests.DIGESTS and s.kind is not Kind.EXTENDS]
    assert set(without) == {
        "sglang.srt.managers.scheduler:Scheduler",
        "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod",
        "sglang.srt.lora.lora_manager:LoRAManager",
        "sglang.srt.model_executor.runner.prefill_cuda_graph_runner:PrefillCudaGraphRunner",
        "sglang.srt.utils.watchdog:SubprocessWatchdog",
    }, "only a class with a substitute has none"


def test_wrong_version_is_fatal(monkeypatch):
    monkeypatch.setattr(check, "version", lambda _: "0.5.99")
    with pytest.raises(SeamError, match=r"written against sglang 0\.5\.23 but sglang here is 0\.5\.99"):
        check.check_sources()


def test_changed_source_is_fatal(monkeypatch):
    from sglang.srt.layers import layernorm_sp

    def runs_sp(forward_mode):
        return False

    monkeypatch.setattr(layernorm_sp, "runs_sp", runs_sp)
    with pytest.raises(SeamError, match="layernorm_sp:runs_sp of the installed sglang has source"):
        check.check_sources()


def test_a_plugin_that_makes_the_objects_of_a_class_is_fatal(monkeypatch):
    from sglang.srt.managers.scheduler import Scheduler

    monkeypatch.setattr(Scheduler, "__new__", staticmethod(lambda cls, *args: object.__new__(cls)))
    with pytest.raises(SeamError, match="scheduler:Scheduler of the installed sglang has another constructor"):
        check.check_sources()


def test_a_declaration_does_not_change_what_it_decorates(monkeypatch):
    monkeypatch.setattr(registry, "_seams", [])
    monkeypatch.setattr(registry, "_overrides", [])
    function, target = len, "sglang.srt.layers.layernorm_sp:runs_sp"
    for declare in (registry.replaces, registry.substitutes_for, registry.relies_on, registry.extends):
        assert declare(target, "why")(function) is function
    assert registry.overrides("why")(function) is function


def test_the_version_is_checked_before_anything_heavy_is_imported():
    code = (
        "import sys; from sglang_shift import seams; seams.check_version(); import sglang_shift.launch_server; "
        "assert not {'torch', 'sglang', 'sglang_shift.runtime'} & sys.modules.keys()"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


INSTALLED = """
from types import SimpleNamespace
from sglang_shift import seams
seams.install()
from sglang.srt.layers import layernorm_sp, linear, logits_processor
from sglang.srt.managers import scheduler
from sglang_shift.runtime import layernorm_sp as ours
assert linear.layernorm_sp.row_parallel_gbar_matmul is ours.row_parallel_gbar_matmul
assert logits_processor.layernorm_sp.runs_sp is ours.runs_sp
assert type(scheduler.Scheduler.__new__(scheduler.Scheduler)).__name__ == "ShiftScheduler"
print("installed")
"""

SUBSTITUTES = """
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.managers.scheduler_components import dp_attn
from sglang.srt.model_executor.model_runner_components import cuda_graph_setup
from sglang_shift.modes import Mode
from sglang_shift.seams.registry import Kind, resolve, seams as all_seams

substitutes = [(resolve(s.target), s.ours, s) for s in all_seams() if s.kind is Kind.SUBSTITUTES_FOR]
assert len(substitutes) == 5
for stock, ours, seam in substitutes:
    class Theirs(stock): ...

    of_stock, of_ours, of_theirs = object.__new__(stock), object.__new__(ours), object.__new__(Theirs)
    assert isinstance(of_stock, stock) and isinstance(of_ours, stock) and isinstance(of_theirs, stock)
    assert not isinstance(object(), stock) and not isinstance(of_stock, ours)
    assert issubclass(stock, stock) and issubclass(ours, stock) and not issubclass(object, stock)
    assert type(ours.__new__(ours)) is ours
    if not seam.exclusive:
        assert type(Theirs.__new__(Theirs)) is Theirs

assert type(UnquantizedLinearMethod()).__name__ == "BaseLinearMethod"
runner = cuda_graph_setup.PrefillCudaGraphRunner
assert runner is dp_attn.PrefillCudaGraphRunner
made = runner.__new__(runner, SimpleNamespace(capture_mode=Mode.SP))
assert type(made).__name__ == "SpPrefillGraphRunner" and isinstance(made, runner)
assert type(runner.__new__(runner, SimpleNamespace(capture_mode=Mode.TP))) is runner
assert type(runner.__new__(runner, SimpleNamespace())) is runner, "SGLang's own model runner"

class Marked(UnquantizedLinearMethod):
    def __init__(self, *args): self.args = args

assert Marked(1, 2).args == (1, 2)
seams.install()  # twice changes nothing
print("substituted")
"""

UNDO = """
from sglang_shift.runtime.scheduler import ShiftScheduler

for owner, name, other in (
    (layernorm_sp, "sp_entry_scatter", layernorm_sp.set_sp_num_tokens),
    (scheduler.Scheduler, "__new__", staticmethod(lambda cls: object.__new__(cls))),
    (ShiftScheduler, "run_batch", None),
):
    seams.verify()
    ours = vars(owner)[name]
    delattr(owner, name)
    if other is not None:
        setattr(owner, name, other)
    try:
        seams.verify()
    except Exception as error:
        print(error)
    setattr(owner, name, ours)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    """One process that installs everything: a start takes long."""
    return run(INSTALLED + SUBSTITUTES + UNDO)


def test_install_reaches_the_callers(done):
    assert "installed" in done.stdout.split(), done.stderr


def test_isinstance_holds_for_objects_of_sglang_and_of_ours(done):
    assert "substituted" in done.stdout.split(), done.stderr


def test_a_seam_that_is_undone_later_is_noticed(done):
    for message in (
        "sp_entry_scatter is not served by sglang_shift.runtime.layernorm_sp:sp_entry_scatter",
        "scheduler:Scheduler is not served by sglang_shift.runtime.scheduler:ShiftScheduler in",
        "Scheduler.run_batch is not served by sglang_shift.runtime.scheduler:ShiftScheduler.run_batch",
    ):
        assert message in done.stdout, done.stderr


def test_a_changed_source_replaces_nothing(monkeypatch):
    from sglang.srt.layers import layernorm_sp
    from sglang.srt.managers.scheduler import Scheduler

    monkeypatch.setitem(digests.DIGESTS, "sglang.srt.utils.weight_checker:WeightChecker.handle", "0" * 16)
    with pytest.raises(SeamError, match=r"WeightChecker\.handle of the installed sglang has source"):
        check.install()
    assert layernorm_sp.runs_sp.__module__ == "sglang.srt.layers.layernorm_sp"
    assert Scheduler.__new__ is object.__new__


def test_the_cpu_platform_replaces_only_on_itself():
    """SGLang calls the platform while it imports its model runner, with our flags and without them."""
    if torch.accelerator.is_available():
        pytest.skip("SGLang's own platform serves a machine with an accelerator")
    code = (
        "from sglang.srt.model_executor import model_runner; from sglang_shift import seams\n"
        "from sglang_shift.platforms import cpu\n"
        "name = 'adjust_config_with_unaligned_cpu_tp'\n"
        "assert cpu.is_active() and getattr(model_runner, name) is cpu.keep_config\n"
        "seams.install()\n"
        "setattr(model_runner, name, print)\n"
        "try: seams.verify()\n"
        "except Exception as error: assert name in str(error)\n"
        "else: raise AssertionError('verified')\n"
        "cpu.is_active.__code__ = (lambda: False).__code__\n"
        "seams.verify(); print('as elsewhere')"
    )
    done = run(code)
    assert done.stdout.strip().endswith("as elsewhere"), done.stderr


class Stock:
    def __init__(self, size=0):
        self.size = size


class Ours(Stock):
    pass


class Theirs(Stock):
    pass


@pytest.fixture
def substituted(monkeypatch):
    """A function that substitutes ``Ours`` for ``Stock``, and returns the seam."""
    target = f"{__name__}:Stock"

    def substitute(exclusive: bool, when=lambda size=0: size > 0):
        seam = Seam(Kind.SUBSTITUTES_FOR, target, Ours, "a test", when, exclusive)
        monkeypatch.setattr(Stock, "__new__", Stock.__new__, raising=False)
        check._substitute(Stock, seam)
        return seam

    return substitute


def test_a_class_of_another_may_not_take_the_place_of_an_exclusive_one(substituted):
    """SGLang's plugins may put a subclass in the place of a class: without a word, ours would not be used."""
    substituted(exclusive=True)
    assert [type(Stock(1)), type(Stock(0)), type(Ours(1))] == [Ours, Stock, Ours] and Stock(1).size == 1
    assert type(Theirs(0)) is Theirs, "ours would not be made here either"
    with pytest.raises(SeamError, match=r"test_seams:Theirs takes the place of .*:Stock, which .*:Ours must have"):
        Theirs(1)


def test_other_subclasses_of_a_class_that_is_not_exclusive_are_made(substituted):
    substituted(exclusive=False)
    assert [type(Stock(1)), type(Theirs(1))] == [Ours, Theirs]


def test_a_name_that_a_plugin_gave_to_its_own_subclass_is_not_ours(substituted, monkeypatch):
    seam = substituted(exclusive=True)
    assert check._in_place(seam)
    monkeypatch.setattr(sys.modules[__name__], "Stock", Theirs)
    assert not check._in_place(seam)
