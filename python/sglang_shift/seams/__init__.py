"""Declares the seams: all places that depend on SGLang's internals. A check finds an SGLang that does not fit them.

A decorator declares each seam, beside its code:

- ``@replaces("module:function", why)``: this function replaces SGLang's function;
- ``@substitutes_for("module:Class", why)``: SGLang's class makes objects of this subclass instead;
- ``@overrides(why)``: this method overrides SGLang's method of the same name;
- ``@relies_on("module:name", why)``: this code is only right while the named code of SGLang stays as it is;
- ``@extends("module:name", why)``: this code uses an extension point that SGLang offers.

The decorators do not change the code below them. ``docs/seams.md`` lists all seams; ``python -m sglang_shift.seams``
writes it.
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
