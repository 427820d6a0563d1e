"""The layout of a rank's KV cache at each level: the same bytes, cut into more pages of fewer heads.

A merged instance divides the heads among more ranks, so a token needs less memory on each of them, and all ranks
together have room for more tokens. If two instances merge, each page of a rank becomes two pages with half of the
heads. SGLang's layout stays: a page is contiguous, and it holds the heads of this rank.

**Numbers.** SGLang keeps page 0 for rows that only fill up a batch, so the pages of tokens begin with number 1. Counted
from 0 without that page, page q of part s becomes page ``q * f + s`` if f instances merge. So the f pages that take the
memory of page q are page q of each of the f instances. Nothing outside of this memory is needed for them, and pages
of different numbers never touch each other: that makes the exchange in place.

A level may have more memory than the lowest one, at the end of the cache. Its pages there have the numbers after all
others. If instances of this level merge or split, these pages follow the same rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


def merged_pages(pages: torch.Tensor, part: int, factor: int) -> torch.Tensor:
    """The numbers that pages of one instance get when it merges with others.

    Args:
        pages: Numbers of SGLang's pages, from 1 on. With a page size of 1 these are slots.
        part: The number of the instance among those that merge.
        factor: f, the number of instances that merge.
    """
    return (pages - 1) * factor + part + 1


def home_of(pages: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where pages of a merged instance are after a split into ``factor`` parts: the part, and the number there."""
    return (pages - 1) % factor, (pages - 1) // factor + 1


def token_slots(pages: torch.Tensor, page_size: int) -> torch.Tensor:
    """The slots of all tokens of pages, in the order of the pages: ``[pages]`` to ``[pages * page_size]``."""
    return (pages[:, None] * page_size + torch.arange(page_size, device=pages.device)).flatten()


@dataclass(frozen=True)
class KvLayout:
    """The KV cache of a rank at the levels of its world.

    Attributes:
        lowest: The level of the smallest instances.
        pages: Pages at the lowest level, with page 0, which holds no tokens.
        heads: KV heads of a rank at the lowest level. The ranks of the highest level divide them further.
        page_size: Tokens in a page.
        hnd: Whether a page is ``[heads, tokens, width]``, and not ``[tokens, heads, width]``.
        extra: Pages that a level has beyond the memory of the lowest level. Their memory does not shrink from a level
            to a higher one.
    """

    lowest: int
    pages: int
    heads: int
    page_size: int
    hnd: bool = False
    extra: Mapping[int, int] = field(default_factory=dict)

    def ratio(self, level: int) -> int:
        """How many of the smallest instances an instance of this level has.

        Raises:
            ValueError: the level is not a multiple of the lowest, or its ranks cannot divide the heads.
        """
        ratio, rest = divmod(level, self.lowest)
        if rest or ratio < 1:
            raise ValueError(f"level {level} is not a multiple of the lowest level, {self.lowest}")
        if self.heads % ratio:
            raise ValueError(
                f"{self.heads} KV heads of a rank at level {self.lowest} cannot be divided further by {ratio}, as "
                f"level {level} would do"
            )
        return ratio

    def heads_at(self, level: int) -> int:
        """KV heads of a rank at a level."""
        return self.heads // self.ratio(level)

    def last_page(self, level: int) -> int:
        """The highest number of a page at a level. Pages 1 to this one can hold tokens."""
        return (self.pages - 1) * self.ratio(level) + self.extra.get(level, 0)

    def tokens(self, level: int) -> int:
        """How many tokens an instance of this level can hold. All its ranks hold the same tokens."""
        return self.last_page(level) * self.page_size

    def elements(self, width: int, level: int | None = None) -> int:
        """Elements of the keys or the values of a layer.

        Args:
            width: The width of a head.
            level: The level that has them; None for the one that has most.
        """
        levels = (self.lowest, *self.extra) if level is None else (level,)
        page = self.page_size * self.heads * width
        return max(self.pages * page + self.extra.get(each, 0) * page // self.ratio(each) for each in levels)

    def view(self, memory: torch.Tensor, width: int, level: int) -> torch.Tensor:
        """The keys or the values of one layer, as SGLang lays them out at a level.

        The page that holds no tokens is the one right before the pages of tokens. Therefore the view begins at another
        address at each level. The pages of tokens always begin at the same address.

        Args:
            memory: All elements of the keys or the values of a layer, as many as :meth:`elements` says.
            width: The width of a head.
            level: The level of the view.

        Returns:
            ``[slots, heads, width]``, or ``[pages, heads, tokens, width]`` if the layout is ``hnd``.

        Raises:
            ValueError: the memory has another size.
        """
        page = self._page(memory, width)
        heads = self.heads_at(level)
        flat = memory[page - page // self.ratio(level) : self.elements(width, level)]
        return flat.view(-1, heads, self.page_size, width) if self.hnd else flat.view(-1, heads, width)

    def parts(self, memory: torch.Tensor, width: int, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The pages of tokens of a layer, as an exchange between two levels reads and writes them.

        Args:
            memory: All elements of the keys or the values of a layer, as many as :meth:`elements` says.
            width: The width of a head.
            low: The lower level. Both levels have its memory.
            high: The higher level, with f times as many ranks.

        Returns:
            Two views of the same bytes, ``[pages of the lower level, f, ...]``. In the first one, ``[q, g]`` is the
            g-th part of the heads of page q. In the second one, ``[q, s]`` is the page of the merged instance whose
            home is page q of part s. Pages are counted from 0, without the page that holds no tokens.

        Raises:
            ValueError: the memory has another size, or ``high`` is not above ``low``.
        """
        factor, rest = divmod(self.ratio(high), self.ratio(low))
        if rest or factor < 2:
            raise ValueError(f"level {high} is not above level {low}, so their instances exchange nothing")
        tokens = memory[self._page(memory, width) : self.elements(width, low)]
        columns = self.heads_at(high) * width
        if self.hnd:
            both = tokens.view(-1, factor, self.page_size * columns)
            return both, both
        local = tokens.view(-1, self.page_size, factor, columns).transpose(1, 2)
        return local, tokens.view(-1, factor, self.page_size, columns)

    def _page(self, memory: torch.Tensor, width: int) -> int:
        """Elements of a page of the lowest level."""
        if memory.shape != (self.elements(width),):
            raise ValueError(f"memory of shape {tuple(memory.shape)} does not fit {self} with heads of width {width}")
        return self.page_size * self.heads * width
