"""The methods that SP steps run in place of SGLang's methods of the same name.

SGLang's modules keep their own ``forward`` for every other step. So a TP step runs exactly SGLang's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_NOTHING = object()


class Forwards:
    """A list of methods and the functions that take their places in SP steps."""

    def __init__(self) -> None:
        self._methods: list[tuple[dict[str, Any], str, Callable[..., Any]]] = []

    def __len__(self) -> int:
        return len(self._methods)

    def replace(self, owner: object, function: Callable[..., Any], name: str = "forward") -> None:
        """Let SP steps call ``function`` in place of the method ``name`` of one object.

        Args:
            owner: The object, for example a module of the model.
            function: Takes the arguments of the method, without ``self``.
            name: The name of the method.
        """
        self._methods.append((vars(owner), name, function))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside of this context, the objects have our functions.

        Python looks for a method in the object before it looks in the class. So an entry in the object's dictionary
        hides the method, and without the entry the method is there again. One entry takes less than 0.1 microseconds.
        """
        hidden = [attributes.get(name, _NOTHING) for attributes, name, _ in self._methods]
        for attributes, name, function in self._methods:
            attributes[name] = function
        try:
            yield
        finally:
            for (attributes, name, _), own in zip(self._methods, hidden, strict=True):
                if own is _NOTHING:
                    attributes.pop(name, None)
                else:
                    attributes[name] = own
