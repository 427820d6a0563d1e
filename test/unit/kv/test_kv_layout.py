"""The numbers and the layout of KV pages at each level."""

from __future__ import annotations

import pytest
import torch
from sglang_shift.kv.layout import KvLayout, home_of, merged_pages, token_slots

LAYOUTS = [
    KvLayout(lowest, pages, 8, page_size, hnd) for lowest, pages in ((1, 5), (2, 3))
    for page_size in (1, 16, 64) for hnd in (False, True)
]  # fmt: skip


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_numbers_are_unique_and_home_is_where_a_page_came_from(factor):
    pages = torch.arange(1, 12)
    merged = [merged_pages(pages, part, factor) for part in range(factor)]
    assert sorted(torch.cat(merged).tolist()) == list(range(1, 11 * factor + 1))
    for part in range(factor):
        parts, numbers = home_of(merged[part], factor)
        assert parts.unique().tolist() == [part] and torch.equal(numbers, pages)


def test_slots_of_pages():
    assert token_slots(torch.tensor([3, 1]), 4).tolist() == [12, 13, 14, 15, 4, 5, 6, 7]
    assert token_slots(torch.tensor([3, 1]), 1).tolist() == [3, 1]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_level_has_the_shapes_that_sglang_gives_a_pool_of_this_size(layout):
    width = 4
    memory = torch.arange(layout.pages * layout.page_size * layout.heads * width)
    for level in (layout.lowest, 2 * layout.lowest, 8 * layout.lowest):
        ratio, heads = level // layout.lowest, layout.heads * layout.lowest // level
        view = layout.view(memory, width, level)
        slots = layout.tokens(level) + layout.page_size
        shape = (slots // layout.page_size, heads, layout.page_size, width) if layout.hnd else (slots, heads, width)
        assert view.shape == shape and view.is_contiguous()
        assert layout.heads_at(level) == heads
        assert layout.tokens(level) == (layout.pages - 1) * ratio * layout.page_size
        # The pages of tokens end with the memory, and all levels have them in the same bytes.
        assert int(view.flatten()[-1]) == len(memory) - 1
        first_of_page_1 = view[1] if layout.hnd else view[layout.page_size]
        assert int(first_of_page_1.flatten()[0]) == len(memory) // layout.pages


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("low", "high"), [(1, 2), (1, 8), (2, 4)])
def test_parts_are_the_elements_that_both_levels_name(layout, low, high):
    """Compare with SGLang's indices: slot, head and column at each level."""
    low, high, width = low * layout.lowest, high * layout.lowest, 4
    memory = torch.arange(layout.pages * layout.page_size * layout.heads * width)
    factor, heads, size = high // low, layout.heads_at(high), layout.page_size
    local, merged = layout.parts(memory, width, low, high)
    for q in (0, layout.last_page(low) - 1):
        for part in range(factor):
            at_low = element_of(layout, memory, low, q + 1)[:, part * heads : (part + 1) * heads]
            at_high = element_of(layout, memory, high, int(merged_pages(torch.tensor(q + 1), part, factor)))
            order = (1, 0, 2) if layout.hnd else (0, 1, 2)  # a page is [tokens, heads, width] or [heads, tokens, width]
            assert torch.equal(local[q, part].flatten(), at_low.permute(order).flatten())
            assert torch.equal(merged[q, part].flatten(), at_high.permute(order).flatten())
            assert at_high.shape == (size, heads, width)


@pytest.mark.parametrize("hnd", [False, True])
def test_a_level_with_more_memory_has_more_pages_at_the_end(hnd):
    plain, width = KvLayout(1, 5, 8, 16, hnd), 4
    layout = KvLayout(1, 5, 8, 16, hnd, {2: 3, 4: 7})
    page = 16 * 8 * width
    assert [layout.tokens(level) - plain.tokens(level) for level in (1, 2, 4)] == [0, 3 * 16, 7 * 16]
    assert [layout.elements(width, level) for level in (1, 2, 4)] == [
        5 * page,
        5 * page + 3 * page // 2,
        5 * page + 7 * page // 4,
    ]
    assert layout.elements(width) == layout.elements(width, 4)
    memory = torch.arange(layout.elements(width))
    for level in (1, 2, 4):
        view, of_level = layout.view(memory, width, level), memory[: layout.elements(width, level)]
        assert torch.equal(view.flatten(), of_level[page - page // level :]), "it ends with the memory of the level"
        common = plain.view(memory[: 5 * page], width, level)
        assert torch.equal(view[: len(common)], common), "the other pages are where they were"
    for low, high in ((1, 2), (1, 4), (2, 4)):
        local, merged = layout.parts(memory, width, low, high)
        assert len(local) == layout.last_page(low), "all pages of the lower level take part in an exchange"
        assert int(merged.flatten()[-1]) == layout.elements(width, low) - 1
    with pytest.raises(ValueError, match="does not fit"):
        layout.view(memory[: 5 * page], width, 1)


def element_of(layout: KvLayout, memory: torch.Tensor, level: int, page: int) -> torch.Tensor:
    """A page as ``[tokens, heads, width]``, by SGLang's rule of where a slot is."""
    view = layout.view(memory, 4, level)
    slots = token_slots(torch.tensor([page]), layout.page_size)
    return view[slots // layout.page_size, :, slots % layout.page_size] if layout.hnd else view[slots]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: k.ratio(3), "level 3 is not a multiple of the lowest level, 2"),
        (lambda k: k.ratio(1), "level 1 is not a multiple of the lowest level, 2"),
        (lambda k: k.heads_at(16), "4 KV heads of a rank at level 2 cannot be divided further by 8"),
        (lambda k: k.view(torch.zeros(7), 4, 2), r"memory of shape \(7,\) does not fit"),
        (lambda k: k.parts(torch.zeros(48), 4, 2, 2), "level 2 is not above level 2"),
        (lambda k: k.parts(torch.zeros(48), 4, 4, 2), "level 2 is not above level 4"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(KvLayout(2, 3, 4, 1))
