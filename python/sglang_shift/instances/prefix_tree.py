"""The prefixes that an instance has cached, as pages of tokens, independent of the cache that holds them.

When instances merge, each rank gets the prefixes of all of them. Every rank goes through them in the same order, so all
ranks build the same cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Space = tuple[str | None, str | None]
"""A namespace of cached prefixes: SGLang's ``extra_key`` and ``cache_salt``. Prefixes of two spaces are never equal."""

ROOT = 0
"""The parent of a first page. SGLang's page 0 holds no tokens, so no page has this number."""


class CachedPage(NamedTuple):
    """A page of the KV cache that holds tokens of a prefix.

    Attributes:
        number: The number of the page, from 1 on.
        parent: The page with the tokens before, or :data:`ROOT`.
        tokens: The tokens of the page. All pages have equally many.
        space: The namespace of the prefix.
    """

    number: int
    parent: int
    tokens: tuple[int, ...]
    space: Space


@dataclass(frozen=True)
class Branch:
    """A cached prefix that no longer one continues. It begins with the same pages as the branch before it.

    Attributes:
        shared: How many pages it shares with the branch before it.
        pages: Its other pages, in the order of its tokens. No branch before it has them.
    """

    shared: int
    pages: list[CachedPage]


class PrefixTree:
    """All cached prefixes of an instance.

    Args:
        pages: The pages, in any order. The parents of all of them are among them.

    Attributes:
        pages: The pages by their numbers.
    """

    def __init__(self, pages: Iterable[CachedPage] = ()) -> None:
        self.pages = {page.number: page for page in pages}
        self._children: dict[int, list[int]] = {}
        for number in sorted(self.pages):
            self._children.setdefault(self.pages[number].parent, []).append(number)
        self._index = {(page.parent, page.tokens, page.space): page.number for page in self.pages.values()}

    def __len__(self) -> int:
        return len(self.pages)

    def walk(self) -> Iterator[CachedPage]:
        """All pages, each after its parent, in an order that follows from their numbers."""
        waiting = self._children.get(ROOT, [])[::-1]
        while waiting:
            number = waiting.pop()
            yield self.pages[number]
            waiting += self._children.get(number, [])[::-1]

    def branches(self) -> Iterator[Branch]:
        """The longest prefixes, in the order of :meth:`walk`. Each page is in the ``pages`` of one branch."""
        waiting = [(number, 0) for number in reversed(self._children.get(ROOT, []))]
        shared, pages = 0, list[CachedPage]()
        while waiting:
            number, depth = waiting.pop()
            if not pages:
                shared = depth
            pages.append(self.pages[number])
            if children := self._children.get(number):
                waiting += [(child, depth + 1) for child in reversed(children)]
            else:
                yield Branch(shared, pages)
                pages = []

    def find(self, tokens: Sequence[int], space: Space) -> list[int]:
        """The pages of the longest cached prefix of ``tokens``."""
        pages: list[int] = []
        size = len(next(iter(self.pages.values())).tokens) if self.pages else 1
        for begin in range(0, len(tokens) - size + 1, size):
            key = (pages[-1] if pages else ROOT, tuple(tokens[begin : begin + size]), space)
            if (number := self._index.get(key)) is None:
                break
            pages.append(number)
        return pages

    def renamed(self, name: Callable[[int], int]) -> PrefixTree:
        """The same prefixes in pages of other numbers.

        Args:
            name: The new number of a page. Different pages get different numbers.
        """
        names = {ROOT: ROOT} | {number: name(number) for number in self.pages}
        return PrefixTree(
            page._replace(number=names[page.number], parent=names[page.parent]) for page in self.pages.values()
        )


def unite(trees: Sequence[PrefixTree]) -> PrefixTree:
    """The prefixes of several instances in one tree. If two instances have the same prefix, the first one's pages stay.

    Args:
        trees: The trees, whose pages have different numbers.
    """
    kept: dict[tuple[int, tuple[int, ...], Space], CachedPage] = {}
    for tree in trees:
        names = {ROOT: ROOT}
        for page in tree.walk():
            mine = page._replace(parent=names[page.parent])
            names[page.number] = kept.setdefault((mine.parent, mine.tokens, mine.space), mine).number
    return PrefixTree(kept.values())
