"""The report that a port to another SGLang release starts from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import sglang_shift
from sglang_shift.errors import ShiftError
from sglang_shift.seams.digests import DIGESTS
from sglang_shift.tools import porting
from sglang_shift.tools.porting import Release

PACKAGE = Path(sglang_shift.__file__).parent
LAYERNORM_SP = "sglang/srt/layers/layernorm_sp.py"


@pytest.fixture(scope="module")
def installed():
    return Release.installed()


@pytest.fixture
def other(tmp_path, installed):
    """A copy of the installed release, to be changed."""
    files = [installed.file(target.partition(":")[0]) for target in DIGESTS]
    for file in [*files, *installed.root.glob("sglang/srt/arg_groups/fields/*.py")]:
        copy = tmp_path / file.relative_to(installed.root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    return tmp_path


def test_sources_are_found_as_they_are_when_sglang_is_imported(installed):
    for target, digest in DIGESTS.items():
        source = installed.source(target)
        assert source is not None, target
        assert porting.digest(source) == digest, target


def test_a_release_beside_itself_has_no_difference(installed):
    assert porting.changed_seams(installed, installed) == {}
    assert porting.missing_imports(installed, PACKAGE) == []
    assert porting.gone_classes(installed, PACKAGE) == []
    report = porting.report(installed, installed, PACKAGE)
    assert "0 server flags that are new\n\n0 server flags that are gone" in report
    assert {"tp_size", "model_path"} <= installed.flags()


def test_changed_and_gone_seams(installed, other):
    file = other / LAYERNORM_SP
    text = file.read_text().replace("def runs_sp(", "def runs(", 1)
    head, name, tail = text.partition("def sp_entry_scatter(")
    file.write_text(head + name + tail.replace("    ", "    # new\n    ", 1))
    changed = porting.changed_seams(installed, Release.unpacked(other))
    module = "sglang.srt.layers.layernorm_sp:"
    assert changed[module + "runs_sp"] == "gone"
    assert "+    # new" in changed[module + "sp_entry_scatter"].splitlines()
    assert module + "column_parallel_g_matmul" not in changed


def test_classes_that_are_gone(other):
    backends = {"base_attn_backend": "class AttentionBackend: ...", "torch_native_backend": ""}
    for name, text in backends.items():
        file = other / f"sglang/srt/layers/attention/{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    package = other / "package"
    package.mkdir()
    seams = [f'@extends("sglang.srt.layers.attention.{name}:AttentionBackend", "why")' for name in backends]
    (package / "a.py").write_text("".join(f"{seam}\nclass Ours: ...\n" for seam in seams))
    gone = porting.gone_classes(Release.unpacked(other), package)
    assert gone == ["sglang.srt.layers.attention.torch_native_backend:AttentionBackend"]


def test_imports_flags_and_requirements(installed, other, tmp_path):
    fields = other / "sglang/srt/arg_groups/fields/parallel.py"
    fields.write_text(fields.read_text().replace("    tp_size:", "    tp_width:", 1))
    metadata = other / "sglang-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Name: sglang\nRequires-Dist: torch==99\n")
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("from sglang.srt.layers.layernorm_sp import runs_sp, jumps_sp\nargs.tp_size\n")
    report = porting.report(installed, Release.unpacked(other), package)
    assert "1 imports of ours that are gone\n  sglang.srt.layers.layernorm_sp:jumps_sp" in report
    assert "1 server flags that are new\n  tp_width" in report
    assert "1 server flags that are gone\n  tp_size (in our a.py)" in report
    assert "1 requirements that are new\n  torch==99" in report


def test_relative_and_star_imports(tmp_path):
    layers = tmp_path / "sglang" / "srt" / "layers"
    layers.mkdir(parents=True)
    (layers / "__init__.py").write_text("from .a import *\nfrom ..b import two as second\n")
    (layers / "a.py").write_text("if True:\n    def one():\n        return 1\n")
    (layers.parent / "b.py").write_text("class Base:\n    def two(self): ...\n\nclass two(Base): ...\n")
    release = Release.unpacked(tmp_path)
    assert release.source("sglang.srt.layers:one") == "    def one():\n        return 1\n"
    assert release.source("sglang.srt.layers:second.two") == "    def two(self): ...\n"
    assert release.source("sglang.srt.layers:third") is None
    assert release.has("sglang.srt", "layers") and not release.has("sglang.srt.layers", "third")


def test_the_command_looks_at_the_whole_package(other, capsys):
    fields = other / "sglang/srt/arg_groups/fields/parallel.py"
    fields.write_text(fields.read_text().replace("    dcp_size:", "    dcp_width:", 1))
    assert porting.main([str(other)]) == 0
    assert "dcp_size (in our " in capsys.readouterr().out


def test_a_folder_without_sglang(tmp_path, capsys):
    with pytest.raises(ShiftError, match="has no folder sglang/srt; give the folder"):
        Release.unpacked(tmp_path)
    assert porting.main([str(tmp_path)]) == 2
    assert "has no folder sglang/srt" in capsys.readouterr().err
