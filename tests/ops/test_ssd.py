"""The SSD scan and step against the recurrence, one token at a time, in float64."""

import functools
import itertools

import pytest
import torch
from scan_inputs import inputs
from torch import Tensor
from torch.autograd import gradcheck

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan import reference
from nanohybrid.ops.ssd_scan import torch as torch_form
from nanohybrid.ops.ssd_step import reference as step_reference
from nanohybrid.ops.ssd_step import torch as step_torch

SHAPES = [(4, 12, 2, 6), (2, 5, 1, 3), (3, 1, 3, 8)]  # heads, head dimension, groups, state size


def over(op, layout):
    return functools.partial(op, layout=layout)


@pytest.mark.parametrize("state", [False, True], ids=["from zeros", "from a state"])
def test_the_scan_is_the_recurrence_in_float64(layout, state, agree):
    tensors = inputs(layout, *SHAPES[0], state=state)
    agree(over(torch_form.ssd_scan, layout), over(reference.ssd_scan, layout), tensors, torch.float64, 1e-10)


def test_a_scan_that_keeps_no_states_is_the_recurrence_too(layout, agree):
    """As in training: the last chunks leave nothing behind, and the states that others leave still carry gradients."""

    def kept_nothing(op):
        def run(**tensors):
            y, state = op(**tensors, layout=layout, keep=False)
            assert state is None
            return y

        return run

    agree(
        kept_nothing(torch_form.ssd_scan),
        kept_nothing(reference.ssd_scan),
        inputs(layout, *SHAPES[0]),
        torch.float64,
        1e-10,
    )


@pytest.mark.parametrize("shape", [*SHAPES[1:], (2, 80, 1, 16), (2, 60, 2, 7)], ids=str)
def test_the_scan_for_other_heads_and_groups(shape, agree):
    layout = Layout.packed([5, 130, 63])
    tensors = inputs(layout, *shape)
    agree(over(torch_form.ssd_scan, layout), over(reference.ssd_scan, layout), tensors, torch.float64, 1e-10)


def test_the_scan_in_fp32_keeps_its_gradients(layout, agree):
    agree(
        over(torch_form.ssd_scan, layout),
        over(reference.ssd_scan, layout),
        inputs(layout, *SHAPES[0]),
        torch.float32,
        5e-5,
    )


def test_the_scan_takes_bf16_inputs_and_sums_in_fp32(layout):
    tensors = inputs(layout, *SHAPES[0])
    narrow = {name: t.bfloat16() if name[0] in "xBC" else t for name, t in tensors.items()}
    y, state = torch_form.ssd_scan(**narrow, layout=layout)
    truth_y, truth_state = reference.ssd_scan(
        **{name: t.double() for name, t in narrow.items()}, layout=layout
    )
    assert y.dtype == state.dtype == torch.float32
    assert (y - truth_y).abs().max() < 1e-5 * truth_y.abs().max()
    assert (state - truth_state).abs().max() < 1e-5 * truth_state.abs().max()


def test_strong_decay_neither_overflows_nor_loses_its_gradients(agree):
    layout = Layout.packed([130, 40])
    tensors = inputs(layout, 2, 3, 1, 4)
    tensors["dt_TH"] = tensors["dt_TH"] * 20
    tensors["A_H"] = torch.tensor([-16.0, -1e-4])
    agree(over(torch_form.ssd_scan, layout), over(reference.ssd_scan, layout), tensors, torch.float32, 2e-4)


def test_gradcheck_of_the_scan():
    layout = Layout.contiguous([3, 2], [126, 4], [0, 1], 256)
    tensors = [t.double().requires_grad_() for t in inputs(layout, 2, 2, 1, 2).values()]
    assert gradcheck(lambda *t: torch_form.ssd_scan(*t[:6], layout, t[6]), tensors)


def test_the_step_is_one_token_of_the_recurrence(agree):
    layout = Layout.packed([1] * 5)
    tensors = {
        name.replace("_T", "_S").replace("initial", "state"): t
        for name, t in inputs(layout, *SHAPES[0]).items()
    }
    agree(step_torch.ssd_step, step_reference.ssd_step, tensors, torch.float64, 1e-12)
    scanned = reference.ssd_scan(*list(tensors.values())[:6], layout, tensors["state_SHPN"])
    for stepped, whole in zip(step_reference.ssd_step(**tensors), scanned, strict=True):
        torch.testing.assert_close(stepped, whole)


def test_the_step_updates_the_state_in_place():
    tensors = list(inputs(Layout.packed([1] * 3), *SHAPES[0]).values())
    with torch.no_grad():
        _, state = step_torch.ssd_step(*tensors)
    assert state.data_ptr() == tensors[-1].data_ptr()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_document_never_sees_the_one_before_it(poison):
    layout = Layout.packed([130, 40, 20])
    tensors = inputs(layout, 2, 3, 1, 4, state=False)

    def run(x_THP: Tensor, B_TGN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x_THP, B_TGN)]
        y, state = torch_form.ssd_scan(**(tensors | {"x_THP": leaves[0], "B_TGN": leaves[1]}), layout=layout)
        y[170:].sum().backward()
        return y[170:], state[2], leaves[0].grad[170:]

    dirty_x, dirty_B = tensors["x_THP"].clone(), tensors["B_TGN"].clone()
    dirty_x[:170], dirty_B[:170] = poison, poison
    for clean, dirty in zip(run(tensors["x_THP"], tensors["B_TGN"]), run(dirty_x, dirty_B), strict=True):
        assert torch.equal(clean, dirty)


def test_results_do_not_depend_on_how_a_prompt_was_cut():
    whole = Layout.packed([300])
    tensors = inputs(whole, 2, 3, 1, 4, state=False)
    D_H, A_H = tensors.pop("D_H"), tensors.pop("A_H")
    y_whole, state_whole = torch_form.ssd_scan(**tensors, A_H=A_H, D_H=D_H, layout=whole)
    for cuts in ([0, 128, 256, 300], [0, 1, 64, 200, 299, 300]):
        state, ys = torch.zeros(1, 2, 3, 4), []
        for begin, end in itertools.pairwise(cuts):
            part = {name: t[begin:end] for name, t in tensors.items()}
            piece = Layout.contiguous([end - begin], [begin], [0], 384)
            y, state = torch_form.ssd_scan(**part, A_H=A_H, D_H=D_H, layout=piece, initial_SHPN=state)
            ys.append(y)
        torch.testing.assert_close(torch.cat(ys), y_whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(state, state_whole, atol=1e-5, rtol=1e-5)
