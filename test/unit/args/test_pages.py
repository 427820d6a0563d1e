"""docs/flags.md and docs/refusals.md are what the code prints, and the code declares every refusal."""

from __future__ import annotations

import ast
import string
import subprocess
import sys
from pathlib import Path

import pytest
import sglang_shift
from harness import REPO
from sglang_shift.args.pages import REFUSAL_SECTIONS, code, flags_page, refusals_of, refusals_page
from sglang_shift.errors import Refusal, Refused

PACKAGE = Path(sglang_shift.__file__).parent
MODULES = {module.__name__: module for modules in REFUSAL_SECTIONS.values() for module in modules}
# The answer to a request while the server runs (docs/usage.md), and the class itself.
ELSEWHERE = {"runtime/scheduler.py", "errors.py"}


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]


@pytest.mark.parametrize(("name", "page"), [("flags", flags_page), ("refusals", refusals_page)])
def test_the_page_is_the_one_that_the_code_prints(name, page):
    command = f"python -m sglang_shift.args {name} > docs/{name}.md"
    assert (REPO / "docs" / f"{name}.md").read_text() == page(), f"run: {command}"


def test_the_command_prints_the_page_and_nothing_else():
    done = subprocess.run(
        [sys.executable, "-m", "sglang_shift.args", "flags"], capture_output=True, text=True, check=True
    )
    assert done.stdout == flags_page()


def test_every_refusal_is_declared_and_on_the_page():
    declaring = set()
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        for call in calls(ast.parse(file.read_text())):
            assert call.func.id != "Refused" or name in ELSEWHERE, f"{name}: declare a Refusal"
            if call.func.id == "Refusal":
                declaring.add("sglang_shift." + name.removesuffix(".py").replace("/", "."))
    assert declaring == set(MODULES)


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_a_refusal_is_raised_with_the_values_of_its_message(module):
    """No refusal has a message that cannot be made, and none is declared in vain."""
    tree = ast.parse(Path(module.__file__).read_text())
    raised = {call.func.id: {k.arg for k in call.keywords} for call in calls(tree) if call.func.id.isupper()}
    declared = {name: value for name, value in vars(module).items() if isinstance(value, Refusal)}
    assert declared and raised.keys() == declared.keys()
    for name, refusal in declared.items():
        assert raised[name] == {field for _, field, _, _ in string.Formatter().parse(refusal.message) if field}, name
        assert refusal.why.endswith("."), name


def test_a_refusal_becomes_one_sentence():
    error = Refusal("--sp-size {S} is {what}", "Why.")(S=1, what="{too} small")
    assert isinstance(error, Refused) and str(error) == "--sp-size 1 is {too} small"


def test_no_two_refusals_have_the_same_message():
    messages = [refusal.message for module in MODULES.values() for refusal in refusals_of(module)]
    assert len(messages) == len(set(messages))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--tp-size P and --sp-size are", "`--tp-size P` and `--sp-size` are"),
        ("--shift-policy tp or sp", "`--shift-policy tp` or sp"),
        ("`--tp-size P` [--x](y.md#--x)", "`--tp-size P` [--x](y.md#--x)"),
        ("unset SGLANG_X; give module:Class", "unset `SGLANG_X`; give `module:Class`"),
    ],
)
def test_flags_and_the_like_are_code(text, expected):
    assert code(text) == expected
