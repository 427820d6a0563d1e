"""Plans which pages of a KV cache move, so that an instance can split and each part keeps the pages that it needs.

After a split, a page can only be where it is at home (:func:`sglang_shift.kv.layout.home_of`). So a page that another
part needs is copied before, to a free page of that part. Each rank copies the heads that it has, and sends nothing. All
ranks of the instance make the same plan, from the same prefixes. If a split takes memory from the cache, the pages at
its end have no home.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from sglang_shift.instances.prefix_tree import ROOT, CachedPage, PrefixTree
from sglang_shift.kv.layout import home_of


@dataclass(frozen=True)
class Claim:
    """A request that a part continues, and what is cached of it.

    Attributes:
        part: The number of the part.
        pages: The pages of its prefix, in the order of its tokens.
    """

    part: int
    pages: Sequence[int]


@dataclass(frozen=True)
class SplitPlan:
    """What a split does to the pages of a KV cache.

    Attributes:
        moves: Pages that are copied before the split, each as its number and the number of the page that gets it.
        trees: What each part keeps, by the numbers of the pages after the split.
        lost: The number of pages that no part keeps.
    """

    moves: list[tuple[int, int]]
    trees: list[PrefixTree]
    lost: int


def plan_split(tree: PrefixTree, claims: Sequence[Claim], factor: int, last_page: int) -> SplitPlan:
    """Plan a split.

    Requests come before other prefixes, in the order of ``claims``. If a part has no page left for a request, the rest
    of its prefix is lost, and the request computes it again. Other prefixes only move to pages that nobody uses.

    Args:
        tree: The prefixes that the instance has cached.
        claims: The requests.
        factor: The number of parts.
        last_page: The highest number of a page that has a home after the split.
    """
    planner = _Planner(tree, factor, last_page)
    for claim in claims:
        planner.want(claim)
    planner.find_room()
    for claim in claims:
        planner.move(claim.pages, claim.part, overwrites=True)
    for branch in tree.branches():
        has = [sum(planner.place(page, part) is not None for page in branch.pages) for part in range(factor)]
        planner.move(branch.pages, has.index(max(has)), overwrites=False)
    return planner.plan()


@dataclass
class _Planner:
    tree: PrefixTree
    factor: int
    last_page: int
    wanted: dict[int, set[int]] = field(default_factory=dict)  # the parts that want a page for their requests
    places: dict[tuple[int, int], int] = field(default_factory=dict)  # the copy of a page for a part
    overwritten: set[int] = field(default_factory=set)
    empty: list[deque[int]] = field(default_factory=list)  # pages without tokens, for each part
    unwanted: list[deque[int]] = field(default_factory=list)  # cached pages that no request wants, for each part

    def want(self, claim: Claim) -> None:
        for page in reversed(claim.pages):
            parts = self.wanted.setdefault(page, set())
            if claim.part in parts:
                return  # and it wants all pages before
            parts.add(claim.part)

    def find_room(self) -> None:
        """List the pages that copies may overwrite. The last pages of prefixes are overwritten first."""
        unwanted = [page.number for page in self.tree.walk() if page.number not in self.wanted][::-1]
        empty = [page for page in range(1, self.last_page + 1) if page not in self.tree.pages]
        self.empty, self.unwanted = self._by_home(empty), self._by_home(unwanted)

    def _by_home(self, pages: Sequence[int]) -> list[deque[int]]:
        return [deque(page for page in pages if self._home(page) == part) for part in range(self.factor)]

    def _home(self, page: int) -> int | None:
        """The part that has the memory of a page after the split; None if the split takes the memory away."""
        return home_of(page, self.factor)[0] if page <= self.last_page else None

    def move(self, pages: Sequence[int], part: int, *, overwrites: bool) -> None:
        """Copy the pages of a prefix that ``part`` would not keep, as far as there is room."""
        for page in pages:
            if self.place(page, part) is not None:
                continue
            if page in self.overwritten:
                return
            if self.empty[part]:
                self.places[page, part] = self.empty[part].popleft()
            elif overwrites and self.unwanted[part]:
                self.places[page, part] = self.unwanted[part].popleft()
                self.overwritten.add(self.places[page, part])
            else:
                return

    def place(self, page: int, part: int) -> int | None:
        """Where ``part`` has a page before the split; None if it has no copy of it."""
        if (page, part) in self.places:
            return self.places[page, part]
        stays = self._home(page) == part and page not in self.overwritten
        return page if stays else None

    def plan(self) -> SplitPlan:
        trees: list[PrefixTree] = []
        kept: set[int] = set()
        for part in range(self.factor):
            names = {ROOT: ROOT}
            pages: list[CachedPage] = []
            for page in self.tree.walk():
                place = self.place(page.number, part)
                if place is None or page.parent not in names:
                    continue
                names[page.number] = home_of(place, self.factor)[1]
                pages.append(page._replace(number=names[page.number], parent=names[page.parent]))
            trees.append(PrefixTree(pages))
            kept |= names.keys()
        moves = [(page, copy) for (page, _), copy in self.places.items()]
        return SplitPlan(moves, trees, len(self.tree.pages.keys() - kept))
