"""Read the YAML file of ``--config``: a line becomes words of a command line, a mistake becomes one sentence."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sglang_shift.errors import ShiftError


class Entry(NamedTuple):
    """One line of the file.

    Attributes:
        name: The flag, as the file spells it.
        value: The value, as YAML parses it.
        text: The value, as the file spells it; empty for a list or a map.
    """

    name: str
    value: Any
    text: str

    @property
    def key(self) -> str:
        """The name with underscores. A file may have dashes or underscores."""
        return self.name.replace("-", "_")


def read(path: str) -> list[Entry]:
    """Read the lines of a file.

    Raises:
        ShiftError: the file cannot be read, or it is not a YAML map.
    """
    if Path(path).suffix.lower() not in (".yaml", ".yml"):
        raise ShiftError(f"--config {path} is not known to be YAML; the file's name must end in .yaml or .yml")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ShiftError(f"--config {path} cannot be read: {error.strerror}; give a file that can") from error
    try:
        loader = yaml.SafeLoader(content)
        document = loader.get_single_node()
        if document is None or document.tag == "tag:yaml.org,2002:null":
            return []
        if not isinstance(document, yaml.MappingNode):
            kind = {"seq": "a list", "str": "a text"}.get(document.tag.rpartition(":")[2], "a number or the like")
            raise ShiftError(f"--config {path} holds {kind}; write a line such as `tp-size: 4` for each flag")
        return [
            Entry(_text(key) or "(a list or a map)", loader.construct_object(value, deep=True), _text(value))
            for key, value in document.value
        ]
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that does not exist is a ValueError
        reason = str(error)
        # The whole message would show the line, which may have a secret key.
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            reason = f"{error.problem} in line {error.problem_mark.line + 1}"
        reason = " ".join(reason.split())[:400]
        raise ShiftError(f"--config {path} is no YAML: {reason}; correct it there") from error


def _text(node: yaml.Node) -> str:
    return str(node.value) if isinstance(node, yaml.ScalarNode) else ""


def arguments(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """Turn a file into the words of a command line of ``parser``. Each line keeps the meaning that SGLang gives it.

    Raises:
        ShiftError: the file has a mistake; the error says which.
    """
    by_name = {action.dest: action for action in reversed(parser._actions)}
    for action in parser._actions:
        by_name |= {option[2:].replace("-", "_"): action for option in action.option_strings if len(option) > 2}
    words: list[str] = []
    actions_so_far: list[argparse.Action] = []
    for entry in read(path):
        entry_label = f"--config {path}: {entry.name}"
        if entry.key not in by_name:
            raise ShiftError(f"{entry_label} is not the name of a flag; correct it there, without dashes before it")
        action = by_name[entry.key]
        if action in actions_so_far:
            raise ShiftError(f"{entry_label} is given twice, by one name or by two; keep one of them")
        actions_so_far.append(action)
        words += _entry_arguments(entry, action, entry_label)
    return words


def _entry_arguments(entry: Entry, action: argparse.Action, entry_label: str) -> list[str]:
    flag, value = action.option_strings[0], entry.value
    if isinstance(action, argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise ShiftError(f"{entry_label} is true or false, without quotes, and here it is neither")
        return [flag] if value else []
    if not (isinstance(action, argparse._StoreAction) or action.nargs is None) or action.dest == "config":
        raise ShiftError(f"{entry_label} cannot be given in a file; give {flag} on the command line")
    if value is None and entry.text not in (action.choices or ()):  # null is a choice of --disaggregation-mode
        raise ShiftError(f"{entry_label} has no value; give it one, or take the line out")
    if isinstance(value, list):
        if action.nargs is None:
            raise ShiftError(f"{entry_label} takes one value, and here it has a list; give it one")
        if any(item is None or isinstance(item, (list, dict)) for item in value):
            raise ShiftError(f"{entry_label} has a list in its list, a map or nothing; give it plain values")
        return [flag, *map(str, value)] if value else []
    # Flag and value are one word. Otherwise argparse would take a value that begins with a dash for a flag.
    return [f"{flag}={_value_text(entry, action, entry_label)}"]


def _value_text(entry: Entry, action: argparse.Action, entry_label: str) -> str:
    """A value as a command line has it. A text stays as the file has it, so an ``--api-key`` of 0123 is not 83."""
    if isinstance(entry.value, dict):
        try:
            return json.dumps(entry.value)
        except (TypeError, ValueError, RecursionError) as error:
            raise ShiftError(
                f"{entry_label} is no JSON ({error}), as which a map is passed; correct it there"
            ) from error
    text = str(entry.value)
    if isinstance(entry.value, bool):
        text = text.lower()
    return entry.text if action.type is str and text != entry.text.lower() else text
