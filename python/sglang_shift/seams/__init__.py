"""Where this package meets SGLang's internals, and the check that SGLang is the one it was written against.

A seam is declared beside the code that makes it one:

- ``@replaces("module:function", why)``: the function is assigned over SGLang's;
- ``@substitutes_for("module:Class", why)``: SGLang's class makes objects of this subclass instead;
- ``@overrides(why)``: the method overrides SGLang's of the same name;
- ``@relies_on("module:name", why)``: the code is right only while SGLang's stays as it is;
- ``@extends("module:name", why)``: the code uses an extension point that SGLang offers.

None of them changes what it decorates. ``docs/seams.md`` lists all seams; ``python -m sglang_shift.seams`` writes it.
"""

from sglang_shift.seams.check import check_sources, check_version, install, put_in_place, verify
from sglang_shift.seams.digests import SGLANG_VERSION
from sglang_shift.seams.registry import extends, overrides, relies_on, replaces, substitutes_for

__all__ = [
    "SGLANG_VERSION",
    "check_sources",
    "check_version",
    "extends",
    "install",
    "overrides",
    "put_in_place",
    "relies_on",
    "replaces",
    "substitutes_for",
    "verify",
]
