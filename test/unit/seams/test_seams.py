"""The seams: complete in the docs, checked at start-up, fatal when something is off."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from harness import REPO
from sglang_shift.errors import SeamError
from sglang_shift.seams import registry

ARCHITECTURE = REPO / "docs" / "architecture.md"


def test_sources_are_those_this_package_was_written_against():
    registry.check_sources()


def test_every_function_has_a_digest():
    without = [s.target for s in registry.SEAMS if s.digest is None]
    assert set(without) == {
        "sglang.srt.managers.scheduler:Scheduler",
        "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod",
        "sglang.srt.model_executor.model_runner_components.cuda_graph_setup:PrefillCudaGraphRunner",
    }, "only a class replaced whole has none"


def test_wrong_version_is_fatal(monkeypatch):
    monkeypatch.setattr(registry, "version", lambda _: "0.5.99")
    with pytest.raises(SeamError, match=r"written against sglang 0\.5\.23 but sglang here is 0\.5\.99"):
        registry.check_sources()


def test_changed_source_is_fatal(monkeypatch):
    from sglang.srt.layers import layernorm_sp

    def runs_sp(forward_mode):
        return False

    monkeypatch.setattr(layernorm_sp, "runs_sp", runs_sp)
    with pytest.raises(SeamError, match="layernorm_sp:runs_sp of the installed sglang has source"):
        registry.check_sources()


INSTALL = """
from sglang_shift.seams import registry
{before}
registry.install()
from sglang.srt.layers import layernorm_sp, linear, logits_processor
from sglang.srt.managers import scheduler
from sglang_shift.weights import projections
from sglang_shift.parallel import region
assert linear.layernorm_sp.row_parallel_gbar_matmul is projections.row_parallel_gbar_matmul
assert logits_processor.layernorm_sp.maybe_exit_gather is region.maybe_exit_gather
assert scheduler.Scheduler.__name__ == "ShiftScheduler"
{after}
print("installed")
"""


def run(before: str = "", after: str = "") -> subprocess.CompletedProcess[str]:
    code = INSTALL.format(before=before, after=after)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


def test_install_reaches_the_callers():
    done = run()
    assert done.stdout.strip().endswith("installed"), done.stderr


def test_a_seam_that_is_undone_later_is_noticed():
    undo = "stock = layernorm_sp.set_sp_num_tokens; layernorm_sp.maybe_exit_gather = stock; registry.verify()"
    done = run(after=undo)
    assert "maybe_exit_gather is not served by sglang_shift.parallel.region:maybe_exit_gather" in done.stderr


def test_a_changed_source_replaces_nothing():
    before = "registry.DIGESTS['sglang.srt.layers.layernorm_sp:runs_sp'] = '0' * 16"
    check = (
        "\nfrom sglang.srt.layers import layernorm_sp\n"
        "try:\n    registry.install()\nexcept Exception as e:\n"
        "    assert layernorm_sp.runs_sp.__module__ == 'sglang.srt.layers.layernorm_sp'; raise"
    )
    done = run(before=before + check)
    assert "SeamError" in done.stderr and "layernorm_sp:runs_sp" in done.stderr


def test_the_table_in_the_docs_is_the_table_in_the_code():
    rows = re.findall(r"^\|\s*(replaces|overrides|relies on)\s*\|(.*?)\|(.*?)\|", ARCHITECTURE.read_text(), re.M)
    documented = {(kind, target.strip(" `"), ours.strip(" `-—")) for kind, target, ours in rows}
    assert documented == {(s.kind, s.target, s.ours) for s in registry.SEAMS}
