"""Property tests of Layout and Plan over random ragged batches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.sizes import CHUNK


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    lengths = draw(st.lists(st.integers(1, 300), min_size=1, max_size=6))
    if draw(st.booleans()):
        return Layout.packed(lengths)
    positions = [draw(st.integers(0, 500)) for _ in lengths]
    return Layout.contiguous(lengths, positions, draw(st.permutations(range(len(lengths)))), 1024)


@given(layouts(), st.sampled_from([None, CHUNK, 16]))
def test_plan_has_each_token_in_exactly_one_row_and_zeros_in_the_padding(layout, chunk):
    plan = layout.plan(chunk)
    rows = np.ones(len(plan.order), dtype=bool)
    rows[plan.padding] = False
    assert sorted(plan.order[rows]) == list(range(layout.tokens))
    flat = torch.cat(
        [part.flatten(0, 1) for part in plan.split(torch.arange(1.0, layout.tokens + 1)[:, None])]
    )
    assert (flat[plan.padding] == 0).all()
    assert torch.equal(flat[plan.inverse, 0], torch.arange(1.0, layout.tokens + 1))


@given(layouts(), st.sampled_from([None, CHUNK]))
def test_plan_join_inverts_split_and_so_do_their_gradients(layout, chunk):
    x = torch.randn(layout.tokens, 2, requires_grad=True)
    plan = layout.plan(chunk)
    joined = plan.join(plan.split(x))
    assert torch.equal(joined, x)
    weight = torch.randn_like(x)
    (joined * weight).sum().backward()
    assert torch.equal(x.grad, weight)


@given(layouts())
def test_plan_chunks_end_at_multiples_of_the_absolute_position_in_order(layout):
    plan = layout.plan(CHUNK)
    positions = layout.token_positions(torch.device("cpu"))
    done = [0] * layout.sequences
    last_round = -1
    for block, part in zip(plan.blocks, plan.split(positions + 1), strict=True):
        assert block.round >= last_round
        last_round = block.round
        for sequence, row in zip(block.sequences, part, strict=True):
            inside = row[row > 0] - 1
            expected = layout.positions[sequence] + done[sequence]
            assert inside.tolist() == list(range(expected, expected + len(inside)))
            done[sequence] += len(inside)
            assert expected // CHUNK == int(inside[-1]) // CHUNK
            assert (int(inside[-1]) + 1) % CHUNK == 0 or done[sequence] == layout.lengths[sequence]
    assert tuple(done) == layout.lengths


@given(layouts())
def test_plan_padding_is_bounded(layout):
    rows = sum(block.rows for block in layout.plan(CHUNK).blocks)
    assert rows <= 16 * sum(len(block.sequences) for block in layout.plan(CHUNK).blocks) + 2 * layout.tokens


def test_layout_derives_starts_pages_and_positions():
    layout = Layout.contiguous([3, 1, 2], [0, 7, 0], [2, 0, 1], 8, 4)
    assert (layout.tokens, layout.sequences, layout.max_length, layout.starts) == (6, 3, 3, (0, 3, 4, 6))
    assert layout.continues == (1,) and not layout.is_decode
    assert layout.pages == ((4, 5), (0, 1), (2, 3))
    cpu = torch.device("cpu")
    assert layout.token_positions(cpu).tolist() == [0, 1, 2, 7, 0, 1]
    assert layout.fresh_mask(cpu).tolist() == [True, False, True]
    assert Layout.contiguous([1, 1], [3, 0], [0, 1], 8).is_decode and not Layout.packed([1, 1]).is_decode


@pytest.mark.parametrize(
    "fields, complaint",
    [
        (dict(lengths=(3, 0), positions=(0, 0)), "at least one token"),
        (dict(lengths=(3,), positions=(0, 0)), "one position"),
        (dict(lengths=(3,), positions=(-1,), slots=(0,)), "one position"),
        (dict(lengths=(3,), positions=(4,)), "needs a slot"),
        (dict(lengths=(3, 1), positions=(0, 0), slots=(1, 1)), "slot of its own"),
        (
            dict(lengths=(3,), positions=(6,), slots=(0,), pages=((0, 1),), page_size=4),
            "cannot hold 9 tokens",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layout_refuses_contradictory_fields(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        Layout(**fields)
