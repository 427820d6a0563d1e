from __future__ import annotations

import random

import pytest
from sglang_shift.instances.prefix_tree import ROOT, CachedPage, PrefixTree, unite

PLAIN = (None, None)


def tree_of(*paths: tuple[list[int], list[int]], space=PLAIN, page_size: int = 1) -> PrefixTree:
    """A tree with these prefixes, each as its pages and its tokens."""
    pages = {}
    for numbers, tokens in paths:
        for place, number in enumerate(numbers):
            of_page = tuple(tokens[place * page_size : (place + 1) * page_size])
            pages[number] = CachedPage(number, numbers[place - 1] if place else ROOT, of_page, space)
    return PrefixTree(pages.values())


def whole(tree: PrefixTree) -> list[tuple[list[int], list[int]]]:
    """All pages and tokens of each branch."""
    path: list[CachedPage] = []
    found = []
    for branch in tree.branches():
        path = path[: branch.shared] + branch.pages
        found.append(([page.number for page in path], [token for page in path for token in page.tokens]))
    return found


def test_branches_have_all_prefixes():
    tree = tree_of(([3, 1, 7], [10, 11, 12]), ([3, 1, 4], [10, 11, 13]), ([9], [20]))
    assert [branch.shared for branch in tree.branches()] == [0, 2, 0]
    assert [page for branch in tree.branches() for page in branch.pages] == list(tree.walk()), "each page once"
    assert whole(tree) == [
        ([3, 1, 4], [10, 11, 13]),
        ([3, 1, 7], [10, 11, 12]),
        ([9], [20]),
    ]


def test_order_does_not_depend_on_the_order_of_the_pages():
    tree = tree_of(([3, 1, 7], [10, 11, 12]), ([3, 1, 4], [10, 11, 13]), ([9, 2], [20, 21]))
    for seed in range(5):
        shuffled = list(tree.pages.values())
        random.Random(seed).shuffle(shuffled)
        assert list(PrefixTree(shuffled).walk()) == list(tree.walk())


@pytest.mark.parametrize(
    ("tokens", "space", "pages"),
    [
        ([1, 2, 3, 4, 5, 6], PLAIN, [5, 8, 2]),
        ([1, 2, 3, 4, 9, 9], PLAIN, [5, 8]),
        ([1, 2, 3], PLAIN, [5]),  # only whole pages
        ([2, 2], PLAIN, []),
        ([1, 2], ("other", None), []),
    ],
)
def test_find_the_longest_prefix(tokens, space, pages):
    tree = tree_of(([5, 8, 2], [1, 2, 3, 4, 5, 6]), page_size=2)
    assert tree.find(tokens, space) == pages


def test_an_empty_tree_finds_nothing():
    assert PrefixTree().find([1, 2], PLAIN) == [] and list(PrefixTree().branches()) == []


def test_the_first_tree_keeps_what_both_have():
    first = tree_of(([1, 3], [10, 11]))
    second = tree_of(([2, 4, 6], [10, 11, 12]), ([8], [30]))
    assert whole(unite([first, second])) == [([1, 3, 6], [10, 11, 12]), ([8], [30])]


def test_equal_tokens_of_two_namespaces_stay_apart():
    united = unite([tree_of(([1], [10])), tree_of(([2], [10]), space=("key", "salt"))])
    assert len(united) == 2
    assert united.find([10], ("key", "salt")) == [2]


def test_renamed():
    tree = tree_of(([1, 2], [10, 11])).renamed(lambda page: 2 * page)
    assert whole(tree) == [([2, 4], [10, 11])]
