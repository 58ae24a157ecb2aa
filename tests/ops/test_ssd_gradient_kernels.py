"""The scan's Triton gradients against the recurrence in float64, every gradient by name: on a GPU, or in
Triton's interpreter.
"""

import pytest
import torch
from scan_inputs import inputs, outputs_of, scan_of
from torch import Tensor

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan import reference
from nanohybrid.ops.ssd_scan import triton_autograd as triton_form

STORED = Layout.with_cache(
    [5, 130, 3], [125, 200, 2], [3, 0, 2], [range(5), [30, 12, *range(14, 23)], [9]], 32
)
CASES = {  # layout; heads, head dimension, groups, state size; whether sequences begin from states
    "one token": (Layout.packed([1]), (2, 4, 1, 3), False),
    "documents of several chunks": (Layout.packed([5, 130, 63]), (4, 12, 2, 6), False),
    "continuation across a border": (STORED, (4, 12, 2, 6), True),
    "heads of 80": (Layout.packed([5, 150]), (2, 80, 1, 16), True),
    "three groups of one head": (Layout.packed([20, 129]), (3, 1, 3, 8), False),
}


@pytest.mark.parametrize("name", CASES)
def test_triton_ssd_scan_has_the_gradients_of_the_recurrence(name, agree, chip):
    layout, shape, state = CASES[name]
    forms = scan_of(triton_form, layout), scan_of(reference, layout)
    agree(*forms, inputs(layout, *shape, state), torch.float32, 5e-5, chip)


def test_triton_ssd_scan_without_final_states_has_the_gradients_of_the_recurrence(agree, chip):
    layout = Layout.packed([40, 140])
    forms = outputs_of(triton_form, layout), outputs_of(reference, layout)
    agree(*forms, inputs(layout, 4, 12, 2, 6, False), torch.float32, 5e-5, chip)


def test_triton_ssd_scan_has_accurate_gradients_with_strong_decay(agree, chip):
    layout = Layout.packed([130, 40])
    tensors = inputs(layout, 2, 3, 1, 4, False)
    tensors["dt_TH"] *= 20
    tensors["A_H"] = torch.tensor([-16.0, -1e-4])
    forms = scan_of(triton_form, layout), scan_of(reference, layout)
    agree(*forms, tensors, torch.float32, 2e-4, chip)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_triton_ssd_scan_gradients_do_not_cross_document_boundaries(poison, chip):
    layout = Layout.packed([30, 20])
    clean = {name: t.to(chip) for name, t in inputs(layout, 2, 3, 1, 4, False).items()}

    def gradients(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        outputs_of(triton_form, layout)(**leaves)[30:].sum().backward()
        return {name: leaf.grad[30:] for name, leaf in leaves.items() if "_T" in name}

    first = torch.arange(30, device=chip)
    dirty = {
        name: t.index_fill(0, first, poison) if name in ("x_THP", "B_TGN", "C_TGN") else t
        for name, t in clean.items()
    }
    expected = gradients(clean)
    for name, gradient in gradients(dirty).items():
        assert torch.equal(gradient, expected[name]), name


def test_triton_ssd_scan_reads_slices_of_a_projection_and_returns_bf16_gradients(chip, close):
    layout = Layout.packed([5, 30])
    plain = inputs(layout, 2, 12, 1, 6, False)
    together = torch.cat([plain[name].flatten(1) for name in ("x_THP", "B_TGN", "C_TGN")], dim=1).bfloat16()

    def run(values: Tensor, form, **others: Tensor) -> list[Tensor]:
        values = values.detach().requires_grad_()
        others = {name: t.detach().requires_grad_() for name, t in others.items()}
        x, B, C = values.split([24, 6, 6], dim=1)
        slices = {
            "x_THP": x.unflatten(1, (2, 12)),
            "B_TGN": B.unflatten(1, (1, 6)),
            "C_TGN": C.unflatten(1, (1, 6)),
        }
        outputs_of(form, layout)(**slices, **others).square().sum().backward()
        return [leaf.grad for leaf in (values, *others.values())]

    others = {name: plain[name] for name in ("dt_TH", "A_H", "D_H")}
    found = run(together.to(chip), triton_form, **{name: t.to(chip) for name, t in others.items()})
    expected = run(together.double(), reference, **{name: t.double() for name, t in others.items()})
    assert found[0].dtype == torch.bfloat16
    for gradient, exact in zip(found, expected, strict=True):
        close(gradient, exact, 2e-2)
