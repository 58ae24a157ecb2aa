"""The SSD scan and step in torch against the recurrence, one token at a time, in float64."""

import itertools

import pytest
import torch
from scan_inputs import inputs, outputs_of, scan_of
from torch import Tensor
from torch.autograd import gradcheck

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan import reference
from nanohybrid.ops.ssd_scan import torch as torch_form
from nanohybrid.ops.ssd_scan.inputs import SSDInputs
from nanohybrid.ops.ssd_step import reference as step_reference
from nanohybrid.ops.ssd_step import torch as step_torch

SHAPES = [(4, 12, 2, 6), (2, 5, 1, 3), (3, 1, 3, 8)]  # heads, head dimension, groups, state size


def both(layout):
    return scan_of(torch_form, layout), scan_of(reference, layout)


@pytest.mark.parametrize("state", [False, True], ids=["from zeros", "from a state"])
def test_ssd_scan_equals_the_recurrence_in_float64(layout, state, agree):
    agree(*both(layout), inputs(layout, *SHAPES[0], state=state), torch.float64, 1e-10)


def test_ssd_scan_without_final_states_equals_the_recurrence(layout, agree):
    """As in training: the last chunks compute no next state, and those of other chunks still have
    gradients.
    """
    forms = outputs_of(torch_form, layout), outputs_of(reference, layout)
    agree(*forms, inputs(layout, *SHAPES[0]), torch.float64, 1e-10)


@pytest.mark.parametrize("shape", [*SHAPES[1:], (2, 80, 1, 16), (2, 60, 2, 7)], ids=str)
def test_ssd_scan_equals_the_recurrence_for_other_heads_and_groups(shape, agree):
    layout = Layout.packed([5, 130, 63])
    agree(*both(layout), inputs(layout, *shape), torch.float64, 1e-10)


def test_ssd_scan_has_accurate_gradients_in_fp32(layout, agree):
    agree(*both(layout), inputs(layout, *SHAPES[0]), torch.float32, 5e-5)


def test_ssd_scan_takes_bf16_inputs_and_sums_in_fp32(layout):
    tensors = inputs(layout, *SHAPES[0])
    narrow = {name: t.bfloat16() if name[0] in "xBC" else t for name, t in tensors.items()}
    y, state = scan_of(torch_form, layout)(**narrow)
    exact_y, exact_state = scan_of(reference, layout)(**{name: t.double() for name, t in narrow.items()})
    assert y.dtype == state.dtype == torch.float32
    assert (y - exact_y).abs().max() < 1e-5 * exact_y.abs().max()
    assert (state - exact_state).abs().max() < 1e-5 * exact_state.abs().max()


def test_ssd_scan_has_accurate_gradients_with_strong_decay(agree):
    layout = Layout.packed([130, 40])
    tensors = inputs(layout, 2, 3, 1, 4)
    tensors["dt_TH"] = tensors["dt_TH"] * 20
    tensors["A_H"] = torch.tensor([-16.0, -1e-4])
    agree(*both(layout), tensors, torch.float32, 2e-4)


def test_ssd_scan_passes_gradcheck():
    layout = Layout.contiguous([3, 2], [126, 4], [0, 1], 256)
    tensors = [t.double().requires_grad_() for t in inputs(layout, 2, 2, 1, 2).values()]
    assert gradcheck(lambda *t: torch_form.ssd_scan(SSDInputs(*t), layout), tensors)


def test_ssd_step_equals_one_token_of_the_recurrence(agree):
    layout = Layout.packed([1] * 5)
    tensors = inputs(layout, *SHAPES[0])
    scanned = scan_of(reference, layout)(**tensors)
    tensors = {
        name.replace("_T", "_S").replace("initial", "state"): tensor for name, tensor in tensors.items()
    }
    agree(step_torch.ssd_step, step_reference.ssd_step, tensors, torch.float64, 1e-12)
    for stepped, expected in zip(step_reference.ssd_step(**tensors), scanned, strict=True):
        torch.testing.assert_close(stepped, expected)


def test_ssd_step_updates_the_state_in_place():
    tensors = list(inputs(Layout.packed([1] * 3), *SHAPES[0]).values())
    with torch.no_grad():
        _, state = step_torch.ssd_step(*tensors)
    assert state.data_ptr() == tensors[-1].data_ptr()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_ssd_scan_resets_state_at_document_boundaries(poison):
    layout = Layout.packed([130, 40, 20])
    tensors = inputs(layout, 2, 3, 1, 4, state=False)

    def run(x_THP: Tensor, B_TGN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x_THP, B_TGN)]
        y, state = scan_of(torch_form, layout)(**(tensors | {"x_THP": leaves[0], "B_TGN": leaves[1]}))
        y[170:].sum().backward()
        return y[170:], state[2], leaves[0].grad[170:]

    dirty_x, dirty_B = tensors["x_THP"].clone(), tensors["B_TGN"].clone()
    dirty_x[:170], dirty_B[:170] = poison, poison
    for clean, dirty in zip(run(tensors["x_THP"], tensors["B_TGN"]), run(dirty_x, dirty_B), strict=True):
        assert torch.equal(clean, dirty)


def test_ssd_scan_does_not_depend_on_how_a_prompt_is_cut_into_calls():
    layout = Layout.packed([300])
    tensors = inputs(layout, 2, 3, 1, 4, state=False)
    y_whole, state_whole = scan_of(torch_form, layout)(**tensors)
    for cuts in ([0, 128, 256, 300], [0, 1, 64, 200, 299, 300]):
        state, ys = torch.zeros(1, 2, 3, 4), []
        for begin, end in itertools.pairwise(cuts):
            part = {name: t[begin:end] if "_T" in name else t for name, t in tensors.items()}
            part_layout = Layout.contiguous([end - begin], [begin], [0], 384)
            y, state = scan_of(torch_form, part_layout)(**part, initial_SHPN=state)
            ys.append(y)
        torch.testing.assert_close(torch.cat(ys), y_whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(state, state_whole, atol=1e-5, rtol=1e-5)
