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

from sglang_shift.instances.prefix_tree import ROOT, Branch, CachedPage, PrefixTree
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
        planner.move(claim)
    path = _Path(planner)
    for branch in tree.branches():
        path.follow(branch)
        path.move(path.counts.index(max(path.counts)))
    return planner.plan()


@dataclass
class _Planner:
    tree: PrefixTree
    factor: int
    last_page: int
    wanted: dict[int, set[int]] = field(default_factory=dict)  # the parts that want a page for their requests
    places: dict[tuple[int, int], int] = field(default_factory=dict)  # the copy of a page for a part
    copied: dict[int, set[int]] = field(default_factory=dict)  # the parts that have a copy of a page
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
        by_home: list[deque[int]] = [deque() for _ in range(self.factor)]
        for page in pages:
            if (part := self._home(page)) is not None:
                by_home[part].append(page)
        return by_home

    def _home(self, page: int) -> int | None:
        """The part that has the memory of a page after the split; None if the split takes the memory away."""
        return home_of(page, self.factor)[0] if page <= self.last_page else None

    def parts(self, page: int) -> set[int]:
        """The parts that have a page, or a copy of it."""
        copies = self.copied.get(page, set())
        home = self._home(page)
        return set(copies) if home is None or page in self.overwritten else {*copies, home}

    def move(self, claim: Claim) -> None:
        """Copy the pages of a request that its part would not keep, as far as there is room."""
        for page in claim.pages:
            if claim.part not in self.parts(page) and not self.copy(page, claim.part, overwrites=True):
                return

    def copy(self, page: int, part: int, *, overwrites: bool) -> bool:
        """Copy a page that ``part`` would not keep, and return whether it still exists and there is room."""
        if page in self.overwritten:
            return False
        if self.empty[part]:
            self.places[page, part] = self.empty[part].popleft()
        elif overwrites and self.unwanted[part]:
            self.places[page, part] = self.unwanted[part].popleft()
            self.overwritten.add(self.places[page, part])
        else:
            return False
        self.copied.setdefault(page, set()).add(part)
        return True

    def plan(self) -> SplitPlan:
        names = [{ROOT: ROOT} for _ in range(self.factor)]
        pages: list[list[CachedPage]] = [[] for _ in range(self.factor)]
        for page in self.tree.walk():
            for part in self.parts(page.number):
                if (parent := names[part].get(page.parent)) is not None:
                    place = self.places.get((page.number, part), page.number)
                    number = names[part][page.number] = home_of(place, self.factor)[1]
                    pages[part].append(page._replace(number=number, parent=parent))
        moves = [(page, copy) for (page, _), copy in self.places.items()]
        return SplitPlan(moves, [PrefixTree(each) for each in pages], len(self.tree.pages.keys() - set().union(*names)))


class _Path:
    """One branch after the other, and which parts have its pages. Each page is looked at once, and not once a branch.

    Attributes:
        counts: For each part, how many pages of the branch it has.
    """

    def __init__(self, planner: _Planner) -> None:
        self.planner = planner
        self.counts = [0] * planner.factor
        self._pages: list[int] = []
        self._parts: list[set[int]] = []  # the parts that have each page
        self._complete = [0] * planner.factor  # for each part, the first pages of the branch, all of which it has

    def follow(self, branch: Branch) -> None:
        """Go on to the next branch."""
        for parts in self._parts[branch.shared :]:
            self._count(parts, -1)
        del self._pages[branch.shared :], self._parts[branch.shared :]
        self._complete = [min(count, branch.shared) for count in self._complete]
        for page in branch.pages:
            parts = self.planner.parts(page.number)
            self._pages.append(page.number)
            self._parts.append(parts)
            self._count(parts, 1)

    def _count(self, parts: set[int], change: int) -> None:
        for part in parts:
            self.counts[part] += change

    def move(self, part: int) -> None:
        """Copy the pages of the branch that ``part`` would not keep, as far as there are pages that nobody uses."""
        for depth in range(self._complete[part], len(self._pages)):
            if part not in self._parts[depth]:
                if not self.planner.copy(self._pages[depth], part, overwrites=False):
                    return
                self._parts[depth].add(part)
                self.counts[part] += 1
            self._complete[part] = depth + 1
