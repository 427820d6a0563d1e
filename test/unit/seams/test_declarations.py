"""Every seam is declared, every declaration is found, and both generated files are up to date."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import sglang_shift
from harness import REPO
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.platforms.interface import SRTPlatform
from sglang_shift.errors import SeamError
from sglang_shift.seams import digests, registry, table
from sglang_shift.seams.registry import Kind

PACKAGE = Path(sglang_shift.__file__).parent
DECLARATIONS = {"extends", "overrides", "relies_on", "replaces", "substitutes_for"}

NOT_IMPORTED = {"sglang_shift.observe.http_worker": "starts a thread, and has no class"}

EXEMPT = {
    "sglang_shift.runtime.reporter:ShiftOutputStreamer.has_additional_customized_info": (
        "the switch that SGLang offers beside build_additional_customized_info"
    ),
    "sglang_shift.tools.gpu_check.one_gpu_platform:OneGpuPlatform.reindex_device_id": "SGLang's API for platforms",
    "sglang_shift.tools.gpu_check.one_gpu_platform:OneGpuPlatform.get_torch_distributed_backend_str": (
        "SGLang's API for platforms"
    ),
}
"""Attributes that override SGLang's without ``@overrides``, and why they may. What ``@extends`` declares is exempt."""


def test_both_files_are_as_the_declarations_make_them():
    document = REPO / "docs" / "seams.md"
    assert table.document(document.read_text()) == document.read_text(), "run: python -m sglang_shift.seams"
    assert table.digests() == Path(digests.__file__).read_text(), "run: python -m sglang_shift.seams"


def test_the_marks_in_the_document_are_needed():
    with pytest.raises(SeamError, match="lacks the line <!-- to here"):
        table.document(table.BEGIN)


ASSIGNED = {
    "engine.py": {"http_server.Engine"},  # which @extends names there
    "observe/routes.py": {"app.build_middleware_stack", "app.router.routes[:0]"},  # the app that @extends names there
    "platforms/draft_sampling.py": {"vars(eagle_utils)"},  # where SGLang has None, which has no source to declare
    "platforms/speculation.py": {"sys.modules"},  # SGLang's kernels, whose library cannot be imported without CUDA
    "tools/gpu_check/dispatch.py": {"vars(unquant)"},  # during one check, in its own process, and put back
}
"""Assignments to SGLang's objects, by file."""

# Every module that declares is in the list


def declaring(package: Path, name: str) -> set[str]:
    """Modules of a package that call a declaration."""
    found = set()
    for file in package.rglob("*.py"):
        if "seams" in file.relative_to(package).parts:
            continue
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        names = {getattr(call, "id", getattr(call, "attr", "")) for call in calls}
        if names & DECLARATIONS:
            found.add(".".join((name, *file.relative_to(package).with_suffix("").parts)))
    return found


def test_no_declaration_is_lost():
    assert declaring(PACKAGE, "sglang_shift") == set(registry.MODULES), "correct MODULES in seams/registry.py"


def test_a_module_that_declares_is_found(tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text("@seams.relies_on('sglang:x', 'why')\ndef f(): ...\n")
    (tmp_path / "room" / "b.py").write_text("def overrides(): ...\n")
    assert declaring(tmp_path, "p") == {"p.room.a"}


def test_all_modules_are_imported_before_anything_is_listed(monkeypatch):
    imported, original = [], importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: imported.append(name) or original(name))
    found = registry.seams()
    assert imported[: len(registry.MODULES)] == list(registry.MODULES)
    assert {seam.ours.__module__ for seam in found} == set(registry.MODULES)


def test_extension_points_exist():
    points = [seam for seam in registry.seams() if seam.kind is Kind.EXTENDS]
    assert points and all(registry.resolve(seam.target) for seam in points)


# No method overrides SGLang's without a declaration


@cache
def classes() -> tuple[type, ...]:
    """All classes of this package that have one of SGLang's above them."""
    found = {}
    for module in pkgutil.walk_packages(sglang_shift.__path__, "sglang_shift."):
        if module.name in NOT_IMPORTED or module.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and value.__module__.startswith("sglang_shift."):
                found[value] = None
    return tuple(c for c in found if any(base.__module__.split(".")[0] == "sglang" for base in c.__mro__))


def undeclared(cls: type) -> Iterator[str]:
    """Attributes of ours that hide SGLang's from objects of ``cls``, and are not declared to do so."""
    seams = registry.seams()
    declared = {(seam.place, seam.target) for seam in seams if seam.kind is Kind.OVERRIDES}
    extending = [seam.ours for seam in seams if seam.kind is Kind.EXTENDS]
    for owner in cls.__mro__:
        if owner in extending or owner.__module__.split(".")[0] == "sglang":
            continue
        for name in vars(owner):
            target = registry.next_in_sglang(cls, owner, name)
            place = f"{owner.__module__}:{owner.__qualname__}.{name}"
            if target and not name.startswith(("__", "_abc_", "_is_protocol")) and (place, target) not in declared:
                yield place


def test_every_override_is_declared():
    names = {cls.__name__ for cls in classes()}
    assert {"ShiftScheduler", "ShiftModelRunner", "ShiftTokenizerWorker", "SpPrefillGraphRunner"} <= names
    found = {place for cls in classes() for place in undeclared(cls)}
    assert found == set(EXEMPT), "declare each with @overrides"


class Planted(Scheduler):
    """A subclass with methods of SGLang's and others."""

    def run_batch(self): ...

    def of_its_own(self): ...

    is_generation = True


class Platform(SRTPlatform):
    """Not declared to extend it."""

    def get_default_attention_backend(self): ...


class Mixin(Scheduler):
    """Overrides one method; for objects of :class:`Mixed`, that of another class."""

    def on_idle(self): ...


class OtherScheduler(Scheduler): ...


OtherScheduler.__module__ = "sglang.elsewhere"
OtherScheduler.on_idle = lambda self: None


class Mixed(Mixin, OtherScheduler): ...


def test_undeclared_overrides_are_found(monkeypatch):
    assert {place.rpartition(".")[2] for place in undeclared(Planted)} == {"run_batch"}
    assert {place.rpartition(".")[2] for place in undeclared(Platform)} == {"get_default_attention_backend"}
    for cls in (Mixin, Mixed):
        cls.__module__ = "sglang_shift.planted"
    assert registry.next_in_sglang(Mixed, Mixin, "on_idle") == "sglang.elsewhere:OtherScheduler.on_idle"
    assert registry.next_in_sglang(Mixin, Mixin, "on_idle") == "sglang.srt.managers.scheduler:Scheduler.on_idle"


def test_a_declaration_that_overrides_nothing_is_an_error():
    with pytest.raises(SeamError, match=r"Planted\.of_its_own overrides nothing"):
        registry.targets_of(Planted.of_its_own)


# No attribute of SGLang's is assigned without a declaration


def assignments(source: str) -> set[str]:
    """Assignments to attributes of what is imported from SGLang, and uses of ``sys.modules``."""
    tree = ast.parse(source)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] == "sglang"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang":
            imported |= {alias.asname or alias.name for alias in node.names}

    def root(node: ast.expr) -> str:
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        return node.id if isinstance(node, ast.Name) else ""

    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            if root(node) in imported:
                found.add(ast.unparse(node))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr", "vars"):
            found |= {ast.unparse(node) for arg in node.args[:1] if root(arg) in imported}
        if ast.unparse(node) == "sys.modules":
            found.add("sys.modules")
    return found


def test_no_attribute_of_sglang_is_assigned_outside_of_the_seams():
    files = [file for file in PACKAGE.rglob("*.py") if file.parent.name != "seams"]
    found = {str(file.relative_to(PACKAGE)): names for file in files if (names := assignments(file.read_text()))}
    assert found == ASSIGNED


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from sglang.srt.managers import scheduler\nscheduler.Scheduler = 1", "scheduler.Scheduler"),
        ("import sglang.srt.managers\nsglang.srt.managers.x = 1", "sglang.srt.managers.x"),
        ("import sglang.srt as s\ns.x += 1", "s.x"),
        ("def f():\n from sglang.srt.a import B as C\n del C.x", "C.x"),
        ("from sglang.srt import a\nsetattr(a.b, 'x', 1)", "setattr(a.b, 'x', 1)"),
        ("from sglang.srt import a\na.TABLE['x'] = 1", "a.TABLE['x']"),
        ("from sglang.srt import a\nvars(a)['x'] = 1", "vars(a)"),
        ("import sys\nsys.modules['sglang'].x = 1", "sys.modules"),
    ],
)
def test_assignments_are_found(code, found):
    assert found in assignments(textwrap.dedent(code))


def test_other_assignments_are_not_found():
    assert not assignments("from sglang.srt import a\nb = a.x\nself.a = a\nb.c = 1\na = None")
