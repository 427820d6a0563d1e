"""``python -m sglang_shift.porting FOLDER`` lists what another SGLang release changes for this package.

``FOLDER`` is an unpacked wheel of that release. Both releases are read as text and never imported, because a release
that this package does not fit yet often fails at import. ``CONTRIBUTING.md`` has the guide.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

from sglang_shift.errors import ShiftError, print_error
from sglang_shift.seams.digests import DIGESTS, SGLANG_VERSION

PACKAGE = Path(__file__).parents[1]
"""The folder of ``sglang_shift``."""
FLAGS = "sglang.srt.arg_groups.fields"
"""The package whose classes have the server's flags as fields."""
WITHOUT_DIGEST = ("substitutes_for", "extends")
"""The decorators of seams whose targets only have to exist."""


class Release:
    """The sources of one SGLang release.

    Args:
        root: The folder that has the folder ``sglang``.
        requirements: The ``Requires-Dist`` lines of the release.

    Raises:
        ShiftError: there is no SGLang in ``root``.
    """

    def __init__(self, root: Path, requirements: list[str]) -> None:
        if not (root / "sglang" / "srt").is_dir():
            raise ShiftError(f"{root} has no folder sglang/srt; give the folder that a wheel of SGLang was unpacked in")
        self.root, self.requirements = root, requirements
        self.text, self.body = cache(self._text), cache(self._body)

    @classmethod
    def installed(cls) -> Release:
        """Return the release of this environment."""
        sglang = distribution("sglang")
        return cls(Path(str(sglang.locate_file(""))), sglang.requires or [])

    @classmethod
    def unpacked(cls, root: Path) -> Release:
        """Return the release of an unpacked wheel."""
        metadata = "".join(file.read_text() for file in root.glob("sglang-*.dist-info/METADATA"))
        return cls(root, re.findall(r"^Requires-Dist: (.*)", metadata, re.M))

    def file(self, module: str) -> Path | None:
        """Return the file of ``module``, or None if this release has no such module."""
        path = self.root.joinpath(*module.split("."))
        return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)

    def _text(self, module: str) -> str:
        file = self.file(module)
        return file.read_text() if file else ""

    def _body(self, module: str) -> dict[str, ast.stmt]:
        statements = ast.parse(self.text(module)).body
        body = bindings(statements)
        for node in nested_statements(statements):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                body |= dict.fromkeys(self.body(self.imported(node, module)).keys() - body.keys(), node)
        return body

    def has(self, module: str, name: str) -> bool:
        """Return whether ``from module import name`` would find something."""
        body = self.body(module)
        return name in body or self.file(f"{module}.{name}") is not None or "__getattr__" in body

    def imported(self, node: ast.ImportFrom, module: str) -> str:
        """Return the module that an import statement in ``module`` names."""
        parents = module.split(".")
        is_package = (file := self.file(module)) is not None and file.name == "__init__.py"
        parents = parents[: len(parents) + is_package - node.level] if node.level else []
        return ".".join([*parents, *filter(None, [node.module])])

    def find(self, module: str, name: str) -> tuple[str, ast.stmt] | None:
        """Return the module that defines a top-level name, and the definition. Imports are followed."""
        node = self.body(module).get(name)
        if isinstance(node, ast.ImportFrom):
            original = next((alias.name for alias in node.names if alias.asname == name), name)
            return self.find(self.imported(node, module), original)
        return None if node is None else (module, node)

    def source(self, target: str) -> str | None:
        """Return the source of a seam's target, ``module:qualified.name``, or None if this release does not have it."""
        module, _, path = target.partition(":")
        name, _, method = path.partition(".")
        definition = self.find(module, name)
        if definition is None:
            return None
        module, node = definition
        if method and isinstance(node, ast.ClassDef):
            method_node = bindings(node.body).get(method)
            if method_node is None:
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                return next(filter(None, (self.source(f"{module}:{base}.{method}") for base in bases)), None)
            node = method_node
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return "".join(self.text(module).splitlines(keepends=True)[first - 1 : node.end_lineno])

    def flags(self) -> set[str]:
        """Return the fields of the release's server arguments."""
        files = self.root.joinpath(*FLAGS.split(".")).glob("*.py")
        statements = [node for file in files for node in ast.parse(file.read_text()).body]
        classes = [node for node in statements if isinstance(node, ast.ClassDef)]
        fields = [node.target for c in classes for node in c.body if isinstance(node, ast.AnnAssign)]
        return {field.id for field in fields if isinstance(field, ast.Name)}


def bindings(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Return what a module or class body defines or imports, by name, also inside ``if``, ``with`` and ``try``.

    If a name occurs several times, the first statement counts.
    """
    statements: dict[str, ast.stmt] = {}
    for node in nested_statements(body):
        names: list[str] = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        for name in names:
            statements.setdefault(name, node)
    return statements


def nested_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a body and of its ``if``, ``with`` and ``try`` blocks."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.With, ast.Try)):
            for part in ("body", "handlers", "orelse", "finalbody"):
                for child in getattr(node, part, []):
                    yield from nested_statements(child.body if isinstance(child, ast.ExceptHandler) else [child])


def digest(source: str) -> str:
    """Return the digest of source text, as :func:`sglang_shift.seams.check.digest_of` computes it."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def changed_seams(old: Release, new: Release) -> dict[str, str]:
    """Return the targets of the seams whose source differs, with the difference, or ``gone`` if there is no source."""
    changed = {}
    for target in DIGESTS:
        before, after = old.source(target) or "", new.source(target)
        if after is None:
            changed[target] = "gone"
        elif after != before:
            lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=2)
            changed[target] = "\n".join(list(lines)[2:])
    return changed


def gone_classes(new: Release, package: Path) -> list[str]:
    """Return the targets that files of ``package`` substitute or extend, and that the release does not have.

    These seams have no digest, because the source of such a target may change.
    """
    calls = [node for file in package.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    targets = {
        call.args[0].value
        for call in calls
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in WITHOUT_DIGEST
        if isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    }
    return sorted(target for target in targets if new.source(target) is None)


def missing_imports(new: Release, package: Path) -> list[str]:
    """Return the names that files of ``package`` import from SGLang and that the release does not have."""
    missing = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sglang":
                missing |= {f"{node.module}:{a.name}" for a in node.names if not new.has(node.module, a.name)}
    return sorted(missing)


def users(name: str, package: Path) -> str:
    """Return the files of ``package`` that have ``name`` as a word, in parentheses; empty if there are none."""
    files = [file.name for file in sorted(package.rglob("*.py")) if re.search(rf"\b{name}\b", file.read_text())]
    return f" (in our {', '.join(files)})" if files else ""


def report(old: Release, new: Release, package: Path) -> str:
    """Return as text what a port must look at."""
    seams, lines = changed_seams(old, new), []
    lines.append(f"{len(seams)} of {len(DIGESTS)} seams differ")
    for target, difference in seams.items():
        lines += ["", f"## {target}", difference]
    sections = {
        "classes and functions that we substitute or extend and that are gone": gone_classes(new, package),
        "imports of ours that are gone": missing_imports(new, package),
        "server flags that are new": sorted(new.flags() - old.flags()),
        "server flags that are gone": [name + users(name, package) for name in sorted(old.flags() - new.flags())],
        "requirements that are new": sorted(set(new.requirements) - set(old.requirements)),
        "requirements that are gone": sorted(set(old.requirements) - set(new.requirements)),
    }
    for title, entries in sections.items():
        lines += ["", f"{len(entries)} {title}", *(f"  {entry}" for entry in entries)]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Print the report and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_shift.porting",
        description=f"What another SGLang release changes for sglang_shift, beside {SGLANG_VERSION}.",
    )
    parser.add_argument("folder", type=Path, help="the folder that a wheel of that release was unpacked in")
    try:
        new = Release.unpacked(parser.parse_args(argv).folder)
        print(report(Release.installed(), new, PACKAGE))
    except ShiftError as error:
        return print_error(error)
    return 0
