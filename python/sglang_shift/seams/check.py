"""Check that the seams fit the installed SGLang, and put our code in place.

:func:`install` runs in the process of each rank, before it builds the scheduler. :func:`verify` runs there again before
the model loads. The launcher calls :func:`check_sources` before it starts any process.
"""

from __future__ import annotations

import hashlib
import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sglang_shift.errors import SeamError
from sglang_shift.seams import digests
from sglang_shift.seams.registry import Kind, Seam, replacement_by, resolve, seams

REMOVE = "remove the plugin that changes it"
_originals: dict[str, Any] = {}  # the functions of SGLang that we replaced, by target


def digest_of(obj: Any) -> str:
    """The first 16 hex digits of the SHA-256 of ``obj``'s source text."""
    return hashlib.sha256(inspect.getsource(getattr(obj, "fget", obj)).encode()).hexdigest()[:16]


def source_of(seam: Seam) -> str:
    """The digest of the source of SGLang's part of a seam, even after our code has replaced it.

    Raises:
        SeamError: there is no such source.
    """
    try:
        target = resolve(seam.target)
        return digest_of(_originals.get(seam.target, target) if target is seam.ours else target)
    except (ImportError, AttributeError, OSError, TypeError) as error:
        raise SeamError(_source_message(seam, f"cannot be read ({error})")) from error


def check_version() -> None:
    """Check that the pinned version of SGLang is installed.

    Raises:
        SeamError: another version is installed, or none.
    """
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        installed = "not installed"
    if installed != digests.SGLANG_VERSION:
        raise SeamError(
            f"sglang_shift is written against sglang {digests.SGLANG_VERSION} but sglang here is {installed}; "
            f"run: pip install sglang=={digests.SGLANG_VERSION}"
        )


def check_sources() -> None:
    """Check the version of SGLang, and the source of every seam's target, against the recorded ones.

    Raises:
        SeamError: the version or a source differs. The error names the first target that differs.
    """
    check_version()
    for seam in seams():
        if seam.has_digest:
            digest, expected = source_of(seam), digests.DIGESTS.get(seam.target)
            if digest != expected:
                raise SeamError(_source_message(seam, f"has source {digest} instead of {expected}"))
        elif seam.kind is Kind.SUBSTITUTES_FOR:
            if not _is_base(seam):
                raise SeamError(_source_message(seam, "is another class"))
            if _constructor(seam) not in (object.__new__, seam.ours):
                raise SeamError(_source_message(seam, "has another constructor"))


def _source_message(seam: Seam, how: str) -> str:
    return (
        f"{seam.target} of the installed sglang {how}, so sglang_shift cannot trust it; "
        f"reinstall it (pip install --force-reinstall --no-deps sglang=={digests.SGLANG_VERSION}) "
        "or remove the plugin that changes it"
    )


def install() -> None:
    """Check everything, then put our code in place. Each process calls it once, before it builds the scheduler.

    Raises:
        SeamError: a check failed. If a version or a source differs, nothing was replaced.
    """
    check_sources()
    for seam in seams():
        if seam.kind is Kind.SUBSTITUTES_FOR or (seam.kind is Kind.REPLACES and seam.condition()):
            put_in_place(seam.ours)
    verify()


def put_in_place(ours: Any) -> None:
    """Put one declared replacement or substitute in place. SGLang may use it before :func:`install` runs."""
    seam = replacement_by(ours)
    original = resolve(seam.target)
    if seam.kind is Kind.SUBSTITUTES_FOR:
        _substitute(original, seam)
    elif original is not ours:
        _originals[seam.target] = original
        owner, _, name = seam.target.replace(":", ".").rpartition(".")
        setattr(resolve(owner), name, ours)


def _substitute(stock: type, seam: Seam) -> None:
    """Make ``stock(...)`` create an object of our class. Python then calls the ``__init__`` of that object's class."""
    variant = getattr(seam.ours, "shift_variant", lambda *args, **kwargs: seam.ours)

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        if issubclass(cls, seam.ours) or not seam.condition(*args, **kwargs):
            return object.__new__(cls)
        if cls is stock:
            return object.__new__(variant(*args, **kwargs))
        if seam.exclusive:
            other = f"{cls.__module__}:{cls.__qualname__}"
            raise SeamError(f"{other} takes the place of {seam.target}, which {seam.place} must have; {REMOVE}")
        return object.__new__(cls)

    new.substitute = seam.ours  # type: ignore[attr-defined]
    stock.__new__ = staticmethod(new)  # type: ignore[assignment]


def _constructor(seam: Seam) -> Any:
    """Our class, if SGLang's class makes objects of it. Otherwise the constructor of SGLang's class."""
    new = resolve(seam.target).__new__
    return getattr(new, "substitute", new)


def verify() -> None:
    """Check that every seam is in place in this process.

    Raises:
        SeamError: a seam is not. The error names the first such seam.
    """
    for seam in seams():
        if not _in_place(seam):
            raise SeamError(
                f"{seam.target} is not served by {seam.place} in this process: something replaced it after "
                f"sglang_shift did; {REMOVE}"
            )


def _is_base(seam: Seam) -> bool:
    """Whether SGLang's name still has the class that ours derives from: a plugin may put a subclass there."""
    return resolve(seam.target) in seam.ours.__bases__


def _in_place(seam: Seam) -> bool:
    if seam.kind is Kind.REPLACES:
        return not seam.condition() or resolve(seam.target) is seam.ours
    if seam.kind is Kind.SUBSTITUTES_FOR:
        return _is_base(seam) and _constructor(seam) is seam.ours
    if seam.kind is Kind.OVERRIDES:
        owner, _, name = seam.place.rpartition(".")
        return name in vars(resolve(owner))
    return True
