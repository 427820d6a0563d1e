"""The methods that SP steps run in place of SGLang's methods of the same name, and other attributes of such steps.

SGLang's modules keep their own ``forward`` for every other step. So a TP step runs exactly SGLang's code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NOTHING = object()


class Forwards:
    """A list of methods and other attributes, and of what takes their places in SP steps."""

    def __init__(self) -> None:
        self._replacements: list[tuple[dict[str, Any], str, Any]] = []

    def __len__(self) -> int:
        return len(self._replacements)

    def replace(self, owner: object, value: Any, name: str = "forward") -> None:
        """Let SP steps see ``value`` in place of the method or attribute ``name`` of one object.

        Args:
            owner: The object, for example a module of the model.
            value: In place of a method, a function that takes the arguments of the method, without ``self``.
            name: The name of the method or attribute.
        """
        self._replacements.append((vars(owner), name, value))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside of this context, the objects have our values.

        Python looks for a method in the object before it looks in the class. So an entry in the object's dictionary
        hides the method, and without the entry the method is there again. One entry takes less than 0.1 microseconds.
        """
        hidden = [attributes.get(name, _NOTHING) for attributes, name, _ in self._replacements]
        for attributes, name, value in self._replacements:
            attributes[name] = value
        try:
            yield
        finally:
            for (attributes, name, _), own in zip(self._replacements, hidden, strict=True):
                if own is _NOTHING:
                    attributes.pop(name, None)
                else:
                    attributes[name] = own
