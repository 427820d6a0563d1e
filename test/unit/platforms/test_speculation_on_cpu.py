"""The kernels of speculative decoding in plain PyTorch, on trees whose links are written down here."""

from __future__ import annotations

import pytest
import torch
from sglang_shift.platforms.speculation import (
    accept_greedily,
    accepted_slots,
    build_tree,
    draft_slots,
    first_slots,
    last_accepted,
    reconstruct_tree,
    slots_of,
    write_slots,
)

# Two trees of five nodes, as the parent of each node. In the second tree, only the first three nodes are drafts.
#     0            0
#    / \           |
#   1   2          1     3  4  (they fill up the tree)
#   |   |          |
#   3   4          2
PARENTS = ((-1, 0, 0, 1, 2), (-1, 0, 1, -1, -1))
CHILDREN = ((1, 3, 4, -1, -1), (1, 2, -1, -1, -1))
SIBLINGS = ((-1, 2, -1, -1, -1), (-1, -1, -1, -1, -1))
DEPTHS = ((0, 1, 1, 2, 2), (0, 1, 2, 0, 0))
SIZE = 5


def mask_of(parents):
    """Whether a node descends from another node. A node descends from itself."""
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for node, parent in enumerate(parents):
        mask[node] = mask[parent] if parent >= 0 else False
        mask[node, node] = True
    return mask


def test_the_links_of_a_tree():
    mask = torch.stack([mask_of(parents) for parents in PARENTS]).flatten()
    positions = torch.empty(2 * SIZE, dtype=torch.int64)
    index, child, sibling = (torch.empty(2, SIZE, dtype=torch.int64) for _ in range(3))
    reconstruct_tree(mask, torch.tensor([10, 20]), positions, index, child, sibling, 2, SIZE)
    assert positions.view(2, SIZE).tolist() == [[10 + d for d in DEPTHS[0]], [20 + d for d in DEPTHS[1]]]
    assert index.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert child.tolist() == [list(each) for each in CHILDREN]
    assert sibling.tolist() == [list(each) for each in SIBLINGS]


@pytest.mark.parametrize("mode", [0, 1])
def test_the_tree_of_a_draft_model(mode):
    """Drafts 0 and 1 follow the root, 2 and 3 follow draft 0, and 4 and 5 follow draft 1. Draft 2 is no node."""
    lengths = [2, 3]
    mask = torch.ones(sum(SIZE * ((0 if mode else n) + SIZE) for n in lengths), dtype=torch.bool)
    positions = torch.empty(2 * SIZE, dtype=torch.int64)
    index, child, sibling = (torch.empty(2, SIZE, dtype=torch.int64) for _ in range(3))
    parents, nodes = torch.tensor([[-1, 0, 1]] * 2), torch.tensor([[0, 1, 3, 4]] * 2)
    build_tree(parents, nodes, torch.tensor(lengths), mask, positions, index, child, sibling, 2, 2, SIZE, mode)
    start = 0
    for request, length in enumerate(lengths):
        columns = SIZE + (0 if mode else length)
        rows = mask[start : start + SIZE * columns].view(SIZE, columns)
        assert rows[:, :-SIZE].all() and torch.equal(rows[:, -SIZE:], mask_of(PARENTS[0]))
        start += SIZE * columns
        assert positions.view(2, SIZE)[request].tolist() == [length + depth for depth in DEPTHS[0]]
    assert index.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert child.tolist() == [list(CHILDREN[0])] * 2
    assert sibling.tolist() == [list(SIBLINGS[0])] * 2


@pytest.mark.parametrize(
    ("predicted", "path"),
    [
        ((12, 0, 14, 0, 99), (0, 2, 4)),  # the second child, and its child
        ((11, 99, 0, 0, 0), (0, 1)),  # the first child, and then another token than its child
        ((99, 13, 14, 0, 0), (0,)),  # no child
    ],
)
def test_the_models_own_tokens_choose_the_path(predicted, path):
    tokens = torch.tensor([[10, 11, 12, 13, 14]] * 2)
    index = torch.arange(2 * SIZE).view(2, SIZE)
    child, sibling = torch.tensor([CHILDREN[0]] * 2), torch.tensor([SIBLINGS[0]] * 2)
    target = torch.tensor([predicted, (99, 0, 0, 0, 0)])
    predicts = torch.zeros(2 * SIZE, dtype=torch.int32)
    accepted = torch.full((2, 4), -1, dtype=torch.int32)
    count = torch.empty(2, dtype=torch.int32)
    accept_greedily(predicts, accepted, count, tokens, index, child, sibling, target)
    assert accepted.tolist() == [[*path, *[-1] * (4 - len(path))], [SIZE, -1, -1, -1]]
    assert count.tolist() == [len(path) - 1, 0]
    assert [predicts[node] for node in path] == [predicted[node] for node in path]
    assert predicts[SIZE] == 99


def test_a_path_is_no_longer_than_the_result():
    tokens, target = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])
    accepted, count = torch.full((1, 2), -1), torch.zeros(1)
    child, sibling = torch.tensor([[1, 2, -1]]), torch.full((1, 3), -1)
    accept_greedily(torch.zeros(3), accepted, count, tokens, torch.arange(3)[None], child, sibling, target)
    assert accepted.tolist() == [[0, 1]] and count.item() == 1


def test_slots():
    """Slots are written into the table of the requests, and read from it."""
    table = torch.zeros(3, 8, dtype=torch.int32)
    rows, starts, ends = torch.tensor([2, 0]), torch.tensor([1, 4]), torch.tensor([4, 6])
    write_slots(rows, table, starts, ends, torch.tensor([11, 12, 13, 14, 15]), 2)
    assert table.tolist() == [[0, 0, 0, 0, 14, 15, 0, 0], [0] * 8, [0, 11, 12, 13, 0, 0, 0, 0]]
    read = slots_of(
        req_pool_indices=rows, req_to_token=table, start_offset=starts, end_offset=starts + 2, batch_size=2,
        draft_token_num=2, device="cpu",
    )  # fmt: skip
    assert read.tolist() == [11, 12, 14, 15] and read.dtype == torch.int64


def test_slots_of_a_draft_model():
    table, out = torch.arange(24, dtype=torch.int32).view(3, 8), torch.empty(4, dtype=torch.int64)
    draft_slots(torch.tensor([2, 0]), table, torch.tensor([1, 4]), out, 1, 2)
    assert out.tolist() == [17, 18, 4, 5]


def test_slots_of_accepted_drafts():
    slots, out = torch.arange(20, 28), torch.zeros(8, dtype=torch.int64)
    first_slots(torch.tensor([3, 1]), slots, out)
    assert out.tolist() == [20, 21, 22, 24, 0, 0, 0, 0]
    out.zero_()
    accepted_slots(torch.tensor([[0, 2, -1], [5, -1, -1]]), slots, out, 6)
    assert out.tolist() == [20, 22, 25, 0, 0, 0, 0, 0]


def test_the_last_accepted_token():
    last = torch.empty(2, dtype=torch.int32)
    last_accepted(torch.tensor([[1, 2, 0], [3, 0, 0]]), torch.tensor([2, 1]), last, 3, 2)
    assert last.tolist() == [2, 3]
