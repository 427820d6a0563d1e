"""``sglang serve ... --sp-size S`` comes here through SGLang's entry point for serve backends."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sglang_shift.args import config_file
from sglang_shift.errors import ShiftError
from sglang_shift.flags import FLAGS
from sglang_shift.seams import extends

if TYPE_CHECKING:
    from sglang.cli.serve_backends import ServeBackend, ServeBackendDetection, ServeRequest

OURS = frozenset(option for flag in FLAGS for option in flag.options)
CONFIG = "--config"


def has_shift_flag(argv: tuple[str, ...]) -> bool:
    """Whether a command line has one of our flags, abbreviated or not, or names a ``--config`` file that has one."""
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        flags = flags_of(name)
        if flags and flags <= OURS:
            return True
        if flags == {CONFIG} and file_has_shift_flag(value if equals else "".join(argv[i + 1 : i + 2])):
            return True
    return False


def flags_of(word: str) -> set[str]:
    """The flags that a word may stand for, by argparse's rules; empty if no flag of ours can be among them."""
    known = {*OURS, CONFIG}
    if word in known:
        return {word}
    if not word.startswith("--") or not any(flag.startswith(word) for flag in known):
        return set()
    # SGLang's flags take long to load, but an abbreviation of our flag may also be a flag of SGLang.
    parser = argparse.ArgumentParser()
    from sglang.srt.server_args import ServerArgs

    ServerArgs.add_cli_args(parser)
    known.update(option for action in parser._actions for option in action.option_strings)
    return {word} if word in known else {flag for flag in known if flag.startswith(word)}


def file_has_shift_flag(path: str) -> bool:
    """Whether a file has one of our flags. If it cannot be read: no, and SGLang's own parser reports the mistake."""
    try:
        entries = config_file.read(path)
    except ShiftError:
        return False
    return any("--" + entry.name.replace("_", "-") in OURS for entry in entries)


def detect(request: ServeRequest) -> ServeBackendDetection:
    """Take a request if it has one of our flags. SGLang serves all other requests."""
    from sglang.cli.serve_backends import ServeBackendDetection

    return ServeBackendDetection.MATCH if has_shift_flag(request.argv) else ServeBackendDetection.NO_MATCH


def run(request: ServeRequest) -> None:
    """Serve until the server is stopped."""
    from sglang_shift.launch_server import main

    main(list(request.argv), prog="sglang serve")


@extends(
    "sglang.cli.serve_backends:ServeBackend",
    "`sglang serve` hands a command line with one of our flags to our backend.",
)
def backend() -> ServeBackend:
    """Make the serve backend. The package's entry points name this function."""
    from sglang.cli.serve_backends import SERVE_BACKEND_API_VERSION, ServeBackend

    return ServeBackend(api_version=SERVE_BACKEND_API_VERSION, run=run, detect=detect, requires_model_path=False)
