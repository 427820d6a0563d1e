from __future__ import annotations

import random

import pytest
from sglang_shift.instances.prefix_tree import ROOT, CachedPage, PrefixTree
from sglang_shift.kv import split_plan
from sglang_shift.kv.layout import home_of
from sglang_shift.kv.split_plan import Claim, SplitPlan, plan_split

PLAIN = (None, None)


def chain(pages: list[int], first_token: int) -> list[CachedPage]:
    parents = [ROOT, *pages[:-1]]
    return [
        CachedPage(page, parent, (first_token + n,), PLAIN)
        for n, (page, parent) in enumerate(zip(pages, parents, strict=True))
    ]


def path(tree: PrefixTree, page: int) -> list[int]:
    """The pages of the prefix that ends with a page."""
    return [] if page == ROOT else [*path(tree, tree.pages[page].parent), page]


def check(tree: PrefixTree, plan: SplitPlan, factor: int) -> None:
    """Check that each kept page has its own tokens after the copies, at home."""
    memory = {page.number: page.tokens for page in tree.pages.values()}
    sources = {source for source, _ in plan.moves}
    targets = [target for _, target in plan.moves]
    assert len(set(targets)) == len(targets) and not sources & set(targets)
    memory |= {target: memory[source] for source, target in plan.moves}
    for part, kept in enumerate(plan.trees):
        for page in kept.pages.values():
            before = (page.number - 1) * factor + part + 1
            assert home_of(before, factor) == (part, page.number)
            assert memory[before] == page.tokens


def test_pages_at_home_stay():
    tree = PrefixTree([*chain([1, 3, 5], 10), *chain([2, 4], 20)])
    plan = plan_split(tree, [Claim(0, [1, 3, 5]), Claim(1, [2, 4])], 2, 8)
    assert plan.moves == [] and plan.lost == 0
    assert [sorted(each.pages) for each in plan.trees] == [[1, 2, 3], [1, 2]]


def test_pages_move_to_their_request():
    tree = PrefixTree(chain([1, 2, 3, 4], 10))
    plan = plan_split(tree, [Claim(1, [1, 2, 3, 4])], 2, 8)
    check(tree, plan, 2)
    assert plan.moves == [(1, 6), (3, 8)]
    assert plan.trees[1].find([10, 11, 12, 13], PLAIN) == [3, 1, 4, 2]
    assert plan.lost == 0


def test_two_parts_get_a_copy_of_a_shared_prefix():
    tree = PrefixTree([*chain([1, 2], 10), CachedPage(3, 2, (50,), PLAIN), CachedPage(4, 2, (60,), PLAIN)])
    plan = plan_split(tree, [Claim(0, [1, 2, 3]), Claim(1, [1, 2, 4])], 2, 12)
    check(tree, plan, 2)
    assert len(plan.trees[0].find([10, 11, 50], PLAIN)) == len(plan.trees[1].find([10, 11, 60], PLAIN)) == 3


def test_requests_come_before_other_prefixes():
    tree = PrefixTree([*chain([1, 3, 5, 7], 10), *chain([2, 4, 6, 8], 20)])
    plan = plan_split(tree, [Claim(1, [1, 3, 5, 7])], 2, 8)
    check(tree, plan, 2)
    assert len(plan.trees[1].find([10, 11, 12, 13], PLAIN)) == 4
    assert plan.lost == 4, "the other prefix was overwritten"


def test_what_does_not_fit_is_lost():
    tree = PrefixTree([*chain([1, 2, 3, 4], 10), *chain([5, 6, 7, 8], 20)])
    plan = plan_split(tree, [Claim(0, [1, 2, 3, 4]), Claim(0, [5, 6, 7, 8])], 2, 8)
    check(tree, plan, 2)
    first, second = (len(plan.trees[0].find([begin + n for n in range(4)], PLAIN)) for begin in (10, 20))
    assert first < 4 and second < 4
    assert len(plan.trees[0]) <= 4


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("factor", [2, 4])
def test_random_caches(seed, factor):
    rng = random.Random(f"{seed} {factor}")
    last = 40 * factor
    free = list(range(1, last + 1))
    rng.shuffle(free)
    pages: dict[int, CachedPage] = {}
    for _ in range(rng.randrange(1, 12)):
        at = rng.choice([ROOT, *pages])
        for _ in range(rng.randrange(1, 12)):
            if free:
                pages[free[-1]] = CachedPage(free[-1], at, (free[-1],), PLAIN)
                at = free.pop()
    tree = PrefixTree(pages.values())
    claims = [Claim(rng.randrange(factor), path(tree, rng.choice(list(pages)))) for _ in range(rng.randrange(6))]
    plan = plan_split(tree, claims, factor, last)
    check(tree, plan, factor)
    homes = [home_of(page, factor)[0] for page in free]
    room = all(homes.count(part) >= len(pages) for part in range(factor))  # then every copy finds a page
    for claim in claims if room else []:
        assert len(plan.trees[claim.part].find([page for page in claim.pages], PLAIN)) == len(claim.pages)
    assert plan.lost == 0 or not room


def test_pages_at_the_end_move_if_the_split_takes_their_memory():
    """Pages 5 to 8 have no home. Requests come first, and other prefixes get what is left."""
    tree = PrefixTree([*chain([1, 5, 6], 10), *chain([2, 7], 20), *chain([8], 30)])
    plan = plan_split(tree, [Claim(0, [1, 5])], 2, 4)
    check(tree, plan, 2)
    assert (5, 3) in plan.moves and all(target <= 4 for _, target in plan.moves)
    assert len(plan.trees[0].find([10, 11], PLAIN)) == 2 and len(plan.trees[1].find([20, 21], PLAIN)) == 2
    assert plan.lost == 2, "pages 6 and 8 find no room"


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("factor", [2, 4])
def test_random_caches_whose_end_goes_away(seed, factor):
    rng = random.Random(f"end {seed} {factor}")
    last, homes = 60 * factor, 20 * factor  # there are at most 20 pages, so each part has room for all of them
    numbers = rng.sample(range(1, last + 1), 20)
    lengths = [rng.randrange(1, 5) for _ in range(rng.randrange(1, 6))]
    chains = [chain([numbers.pop() for _ in range(length)], 100 * n) for n, length in enumerate(lengths)]
    tree = PrefixTree(page for each in chains for page in each)
    claims = [Claim(rng.randrange(factor), [page.number for page in each]) for each in chains]
    plan = plan_split(tree, claims, factor, homes)
    check(tree, plan, factor)
    assert all(target <= homes for _, target in plan.moves)
    for claim, each in zip(claims, chains, strict=True):
        tokens = [token for page in each for token in page.tokens]
        assert len(plan.trees[claim.part].find(tokens, PLAIN)) == len(each)
    assert plan.lost == 0


def test_the_work_grows_with_the_pages_and_not_with_the_lengths_of_all_prefixes(monkeypatch):
    """Many conversations begin with one long prefix."""
    calls = 0

    def counted(page: int, factor: int) -> tuple[int, int]:
        nonlocal calls
        calls += 1
        return home_of(page, factor)

    monkeypatch.setattr(split_plan, "home_of", counted)
    trunk, ends, factor = list(range(1, 1001)), range(1001, 1301), 8
    tree = PrefixTree([*chain(trunk, 0), *(CachedPage(end, trunk[-1], (end,), PLAIN) for end in ends)])
    last = 1400 * factor
    plan = plan_split(tree, [], factor, last)
    check(tree, plan, factor)
    assert plan.lost == 0
    assert calls < 3 * last
