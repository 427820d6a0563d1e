"""Sampling with drafts: each token has the probability that it has without drafts, and the books are right."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch
from sglang.srt.speculative import eagle_utils
from sglang_shift.platforms.draft_sampling import KERNELS, accept_by_chance, keep_top_k, keep_top_p, register

TOKENS = 6
# Five nodes, as the parent of each node: the root has two children, and each of them has one.
PARENTS = (-1, 0, 0, 1, 2)
NODES = (0, 3, 1, 3, 5)
"""The tokens of the nodes."""
QUARTERS = ((0, 1, 0, 2, 1, 0), (1, 1, 0, 2, 0, 0), (0, 0, 0, 1, 0, 3), (2, 1, 1, 0, 0, 0), (0, 0, 4, 0, 0, 0))
"""The probability of each token after each node, times 4."""


def links(parents):
    """The first child and the next sibling of each node."""
    child, sibling = [-1] * len(parents), [-1] * len(parents)
    for parent in set(parents) - {-1}:
        children = [node for node, its_parent in enumerate(parents) if its_parent == parent]
        child[parent] = children[0]
        for node, following in pairwise(children):
            sibling[node] = following
    return child, sibling


def sample(probs, coins, last_coins, parents=PARENTS, nodes=NODES, depth=4, **thresholds):
    """The path of each request, and all tokens after it: what is written about them is checked.

    Args:
        probs: ``[nodes, tokens]``, for all requests.
        coins: ``[requests, nodes]``.
        last_coins: ``[requests]``.
    """
    requests, size = coins.shape
    predicts = torch.full((requests * size,), -5, dtype=torch.int32)
    accepted = torch.full((requests, depth), -1, dtype=torch.int32)
    count = torch.empty(requests, dtype=torch.int32)
    index = torch.arange(requests * size).view(requests, size)
    child, sibling, tokens = (torch.tensor(each).expand(requests, size) for each in (*links(parents), nodes))
    target = probs.expand(requests, *probs.shape).clone()
    accept_by_chance(
        predicts, accepted, count, tokens, index, child, sibling, coins, last_coins, target, torch.zeros_like(target),
        **thresholds,
    )  # fmt: skip
    assert torch.equal(target, probs.expand_as(target)), "SGLang's tensors stay as they are"
    found = []
    for request, number in enumerate(count.tolist()):
        row = accepted[request].tolist()
        path = [node - request * size for node in row[: number + 1]]
        assert path[0] == 0 and set(row[number + 1 :]) <= {-1}
        assert all(parents[node] == before for before, node in pairwise(path))
        mine = predicts[index[request]].tolist()
        chosen = [mine[node] for node in path]
        assert chosen[:-1] == [nodes[node] for node in path[1:]]
        assert {mine[node] for node in range(size) if node not in path} <= {-5}, "the others stay as they are"
        found.append((path, chosen))
    return found


def test_each_answer_has_its_probability():
    """All coins on grids that are fine enough for quarters, so that the shares are exact."""
    grid = [(i + 0.5) / 4 for i in range(4)]
    cases = list(product(grid, grid, [(i + 0.5) / 12 for i in range(12)]))
    coins = torch.tensor([[root, node, node, 9.0, 9.0] for root, node, _ in cases])
    probs = torch.tensor(QUARTERS) / 4
    answers = [tuple(chosen) for _, chosen in sample(probs, coins, torch.tensor([last for *_, last in cases]))]
    assert max(map(len, answers)) == 3
    after = dict(zip(((), (3,), (1,), (3, 3), (1, 5)), probs.tolist(), strict=True))
    for before, expected in after.items():
        begun = [answer[len(before)] for answer in answers if answer[: len(before)] == before and answer != before]
        assert len(begun) > 0
        assert [begun.count(token) / len(begun) for token in range(TOKENS)] == expected, before


def test_random_trees_and_coins():
    """Against a search through the parents. Probabilities count up to a factor, as after top-k."""
    generator = torch.Generator().manual_seed(0)
    rejected = 0
    for _ in range(40):
        size = int(torch.randint(2, 9, (), generator=generator))
        parents = [-1] + [int(torch.randint(0, node, (), generator=generator)) for node in range(1, size)]
        nodes = torch.randperm(TOKENS * 2, generator=generator)[:size].tolist()
        probs = torch.rand(size, TOKENS * 2, generator=generator) ** 3
        coins, last = torch.rand(30, size, generator=generator), torch.rand(30, generator=generator)
        for (path, chosen), mine, final in zip(
            sample(probs, coins, last, parents, nodes, depth=3), coins, last.tolist(), strict=True
        ):
            expected, node = [0], 0
            rest = probs[0].double() / probs[0].double().sum()
            while len(expected) < 3:
                children = [each for each in range(size) if parents[each] == node]
                sums = rest[[nodes[each] for each in children]].cumsum(0)
                taken = [each for each, total in zip(children, sums, strict=True) if mine[node] < total]
                if not taken:
                    rest[[nodes[each] for each in children]] = 0
                    rejected += len(children)
                    break
                expected.append(node := taken[0])
                rest = probs[node].double() / probs[node].double().sum()
            sums = rest.cumsum(0) / rest.sum()
            assert path == expected
            assert chosen[-1] == next(token for token, total in enumerate(sums) if total > final)
    assert rejected > 100


@pytest.mark.parametrize(
    ("coin", "thresholds", "path"),
    [
        (0.24, {}, [0, 1]),  # token 3 has the probability 0.25, and token 1 as well
        (0.26, {}, [0, 2]),
        (0.51, {}, [0]),
        (0.49, {"threshold_acc": 0.5}, [0, 1]),
        (0.99, {"threshold_acc": 0.5}, [0, 2]),
        (0.99, {"threshold_acc": 0.0}, [0, 1]),
        (0.99, {"threshold_single": 0.25}, [0, 1]),
        (0.99, {"threshold_single": 0.26}, [0]),
    ],
)
def test_thresholds(coin, thresholds, path):
    probs = torch.tensor([[1, 1, 0, 1, 1, 0]] + [[0] * 5 + [4]] * 4) / 4
    found = sample(probs, torch.full((1, 5), coin), torch.tensor([0.0]), depth=2, **thresholds)
    assert found[0][0] == path


@pytest.mark.parametrize("last", [0.0, 1 - 2**-24])
def test_an_impossible_token_is_never_taken(last):
    """Neither as a draft, nor after the drafts, however the coins fall. A grammar makes tokens impossible."""
    probs = torch.tensor([[0, 0, 1, 0, 1, 0]] * 5) / 2
    [(path, chosen)] = sample(probs, torch.zeros(1, 5), torch.tensor([last]), threshold_single=0.0)
    assert path == [0] and chosen == [4 if last else 2]


def test_children_with_all_of_the_mass_leave_none_to_the_last_coin():
    """Sums of probabilities round. The largest coin still accepts the last child, since nothing else is left."""
    probs = torch.zeros(11, 11)
    probs[0, :10] = 0.1
    probs[10, 10] = 1
    largest = torch.full((1, 11), 1 - 2**-24)
    parents, nodes = (-1, *[0] * 10), (10, *range(10))
    assert sample(probs, largest, largest[0, :1], parents, nodes) == [([0, 10], [9, 10])]


@pytest.mark.parametrize("top_k", [1, 5, 1 << 30])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 1.0])
def test_filters_are_those_without_drafts(top_k, top_p):
    """SGLang's sampler limits the same probabilities by top-k and by top-p. The other rows have limits of their own."""
    probs = torch.softmax(torch.randn(3, 50, generator=torch.Generator().manual_seed(1)) * 2, -1)
    top_ks, top_ps = torch.tensor([top_k, 7, 1 << 30], dtype=torch.int32), torch.tensor([top_p, 0.8, 1.0])
    _, weights, tokens, _ = top_k_top_p_min_p_sampling_from_probs_torch(
        probs.clone(), top_ks, top_ps, torch.zeros(3), False, None, None, return_filtered_probs=True
    )
    expected = torch.zeros_like(probs).scatter_(-1, tokens.long(), weights)
    assert torch.equal(keep_top_p(keep_top_k(probs, top_ks), top_ps), expected)
    assert torch.equal(keep_top_k(probs, top_ks).count_nonzero(-1), top_ks.clamp(max=50))


def test_sglang_gets_all_of_them(monkeypatch):
    for name in KERNELS:
        monkeypatch.setattr(eagle_utils, name, None)
    register()
    assert {name: vars(eagle_utils)[name] for name in KERNELS} == KERNELS
