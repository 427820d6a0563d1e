"""Defines the decorators that declare seams, and lists all declared seams.

A declaration registers itself when its module is imported. So :func:`seams` first imports every module of
:data:`MODULES`. A test compares :data:`MODULES` with the sources.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from sglang_shift.errors import SeamError

T = TypeVar("T")

PACKAGE, SGLANG = "sglang_shift", "sglang"

MODULES = (
    "sglang_shift.args.graph_memory",
    "sglang_shift.args.server_args",
    "sglang_shift.engine",
    "sglang_shift.graphs.mode_graphs",
    "sglang_shift.graphs.runners",
    "sglang_shift.instances.room",
    "sglang_shift.kv.pool",
    "sglang_shift.layers.embedding",
    "sglang_shift.layers.experts",
    "sglang_shift.layers.linear",
    "sglang_shift.layers.logits",
    "sglang_shift.layers.pipelined",
    "sglang_shift.layers.skins",
    "sglang_shift.layers.streams",
    "sglang_shift.layers.structure",
    "sglang_shift.memory.cuda",
    "sglang_shift.models.fields",
    "sglang_shift.models.rope_fields",
    "sglang_shift.observe.routes",
    "sglang_shift.parallel.level",
    "sglang_shift.parallel.region",
    "sglang_shift.parallel.topology",
    "sglang_shift.platforms.attention_backend",
    "sglang_shift.platforms.cpu",
    "sglang_shift.platforms.draft_sampling",
    "sglang_shift.platforms.fa3",
    "sglang_shift.platforms.fa3_shards",
    "sglang_shift.platforms.fallbacks",
    "sglang_shift.platforms.lora",
    "sglang_shift.platforms.shards",
    "sglang_shift.platforms.speculation",
    "sglang_shift.platforms.token_shards",
    "sglang_shift.runtime.admission",
    "sglang_shift.runtime.calibrator",
    "sglang_shift.runtime.controller",
    "sglang_shift.runtime.detokenizer",
    "sglang_shift.runtime.instance_cache",
    "sglang_shift.runtime.instance_channels",
    "sglang_shift.runtime.instance_queue",
    "sglang_shift.runtime.instance_requests",
    "sglang_shift.runtime.instance_scheduler",
    "sglang_shift.runtime.internal_state",
    "sglang_shift.runtime.layernorm_sp",
    "sglang_shift.runtime.level_change",
    "sglang_shift.runtime.level_execution",
    "sglang_shift.runtime.level_switch",
    "sglang_shift.runtime.model_runner",
    "sglang_shift.runtime.operator_requests",
    "sglang_shift.runtime.penalties",
    "sglang_shift.runtime.prefill_adder",
    "sglang_shift.runtime.process_watch",
    "sglang_shift.runtime.profiles",
    "sglang_shift.runtime.quiesce",
    "sglang_shift.runtime.rank_consensus",
    "sglang_shift.runtime.released_memory",
    "sglang_shift.runtime.reporter",
    "sglang_shift.runtime.request_record",
    "sglang_shift.runtime.scheduler",
    "sglang_shift.runtime.sparse_prefill",
    "sglang_shift.runtime.tokenizer_manager",
    "sglang_shift.runtime.tp_worker",
    "sglang_shift.runtime.weight_updater",
    "sglang_shift.runtime.weight_updates",
    "sglang_shift.serve_backend",
    "sglang_shift.weights.base_weights",
    "sglang_shift.weights.one_gemm",
    "sglang_shift.weights.stacked",
)
"""The names of all modules with a declaration. The list has names because this room imports from no room above it."""


class Kind(StrEnum):
    """How our code depends on SGLang's code."""

    REPLACES = "replaces"
    SUBSTITUTES_FOR = "substitutes for"
    OVERRIDES = "overrides"
    RELIES_ON = "relies on"
    EXTENDS = "extends"


@dataclass(frozen=True)
class Seam:
    """One place at which this package meets SGLang's internals.

    Attributes:
        kind: How our code depends on the target.
        target: ``module:qualified.name`` in SGLang.
        ours: Our function, method or class.
        why: The reason for the seam.
        condition: For a replacement, says whether it applies in this process. For a substitute, it gets the arguments
            of a constructor call, and says whether this call makes an object of the substitute.
        exclusive: For a substitute, whether an object of another subclass is an error when it would be ours.
    """

    kind: Kind
    target: str
    ours: Any
    why: str
    condition: Callable[..., bool] = lambda *args, **kwargs: True
    exclusive: bool = False

    @property
    def place(self) -> str:
        """Our code, as ``module:qualified.name``."""
        return f"{self.ours.__module__}:{self.ours.__qualname__}"

    @property
    def has_digest(self) -> bool:
        """Whether the source of the target must stay as it is. Otherwise only the target must exist."""
        return self.kind in (Kind.REPLACES, Kind.OVERRIDES, Kind.RELIES_ON)


_seams: list[Seam] = []
_overrides: list[tuple[Any, str]] = []  # methods of classes that do not exist yet, and why they override


def replaces(target: str, why: str, *, when: Callable[[], bool] = lambda: True) -> Callable[[T], T]:
    """Declare that a function replaces ``target``.

    Args:
        target: ``module:name``, in the module that SGLang's callers get it from, or ``module:Class.method``.
        why: The reason.
        when: Returns whether this process needs the replacement.
    """
    return _declare(Kind.REPLACES, target, why, when)


def substitutes_for(
    target: str, why: str, *, when: Callable[..., bool] = lambda *a, **k: True, exclusive: bool = False
) -> Callable[[T], T]:
    """Declare that SGLang's class makes objects of the decorated class, which is a subclass of it.

    SGLang's class itself stays, under every name that a module imported it by. So ``isinstance`` and ``issubclass``
    hold for SGLang's objects and for our objects.

    The decorated class may have a static method ``shift_variant``. It gets the arguments of the constructor, and
    returns the subclass of the decorated class of which an object is made.

    Args:
        target: ``module:Class``.
        why: The reason.
        when: Gets the arguments of the constructor. If it returns False, SGLang's class makes its own object.
        exclusive: Whether an object of another subclass, such as a plugin's, is an error when it would be ours.
    """
    return _declare(Kind.SUBSTITUTES_FOR, target, why, when, exclusive)


def relies_on(target: str, why: str) -> Callable[[T], T]:
    """Declare that our function or class is only right while the source of ``target`` stays as it is."""
    return _declare(Kind.RELIES_ON, target, why)


def extends(target: str, why: str) -> Callable[[T], T]:
    """Declare that our code uses ``target``, an extension point that SGLang offers. Its source may change.

    If the decorator is on a class, the methods of the class need no ``@overrides``.
    """
    return _declare(Kind.EXTENDS, target, why)


def overrides(why: str) -> Callable[[T], T]:
    """Declare that a method overrides SGLang's method of the same name. It goes below ``@property`` and the like."""

    def declare(method: T) -> T:
        _overrides.append((method, why))
        return method

    return declare


def _declare(kind: Kind, target: str, why: str, *options: Any) -> Callable[[T], T]:
    def declare(ours: T) -> T:
        _seams.append(Seam(kind, target, ours, why, *options))
        return ours

    return declare


def seams() -> list[Seam]:
    """All seams, by kind and target.

    Raises:
        SeamError: a method is declared to override one that SGLang does not have.
    """
    for module in MODULES:
        importlib.import_module(module)
    kinds = list(Kind)
    override_seams = [Seam(Kind.OVERRIDES, target, m, why) for m, why in _overrides for target in targets_of(m)]
    return sorted(_seams + override_seams, key=lambda seam: (kinds.index(seam.kind), seam.target, seam.place))


def replacement_by(ours: Any) -> Seam:
    """The seam of a replacement or a substitute. Unlike :func:`seams`, this imports no other module."""
    kinds = (Kind.REPLACES, Kind.SUBSTITUTES_FOR)
    return next(seam for seam in _seams if seam.kind in kinds and seam.ours is ours)


def targets_of(method: Any) -> list[str]:
    """The methods of SGLang that our method overrides. A method of a mixin can override methods of several classes.

    Raises:
        SeamError: it overrides no method of SGLang.
    """
    owner, _, name = method.__qualname__.rpartition(".")
    cls = resolve(f"{method.__module__}:{owner}")
    found = [next_in_sglang(each, cls, name) for each in family(cls)]
    targets = dict.fromkeys(target for target in found if target)
    if not targets:
        raise SeamError(f"{method.__module__}:{method.__qualname__} overrides nothing: no class of SGLang's has {name}")
    return list(targets)


def family(cls: type) -> Iterator[type]:
    """A class and all its subclasses in this package."""
    yield cls
    sub: type
    for sub in cls.__subclasses__():
        if sub.__module__.split(".")[0] == PACKAGE:
            yield from family(sub)


def next_in_sglang(cls: type, owner: type, name: str) -> str | None:
    """The attribute of SGLang that ``owner.name`` hides in ``cls``, a subclass of ``owner``; None if there is none."""
    mro = cls.__mro__
    for base in mro[mro.index(owner) + 1 :]:
        if base.__module__.split(".")[0] == SGLANG and name in vars(base):
            return f"{base.__module__}:{base.__qualname__}.{name}"
    return None


def resolve(path: str) -> Any:
    """The object at ``module:qualified.name``."""
    return pkgutil.resolve_name(path)
