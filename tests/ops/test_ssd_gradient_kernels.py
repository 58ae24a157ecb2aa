"""The scan's gradient kernels against the recurrence in float64, every gradient by name: on a GPU, or in Triton's interpreter."""

import functools

import pytest
import torch
from scan_inputs import inputs
from torch import Tensor

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan import reference
from nanohybrid.ops.ssd_scan import triton_autograd as trained

STORED = Layout.with_cache(
    [5, 130, 3], [125, 200, 2], [3, 0, 2], [range(5), [30, 12, *range(14, 23)], [9]], 32
)
CASES = {  # layout; heads, head dimension, groups, state size; whether sequences begin from states
    "one token": (Layout.packed([1]), (2, 4, 1, 3), False),
    "documents of several pieces": (Layout.packed([5, 130, 63]), (4, 12, 2, 6), False),
    "continuation across a border": (STORED, (4, 12, 2, 6), True),
    "heads of 80": (Layout.packed([5, 150]), (2, 80, 1, 16), True),
    "three groups of one head": (Layout.packed([20, 129]), (3, 1, 3, 8), False),
}


@pytest.mark.parametrize("name", CASES)
def test_the_scans_gradients(name, agree, chip):
    layout, shape, state = CASES[name]
    over = [functools.partial(op, layout=layout) for op in (trained.ssd_scan, reference.ssd_scan)]
    agree(*over, inputs(layout, *shape, state), torch.float32, 5e-5, chip)


def test_a_scan_that_keeps_no_states_has_its_gradients_too(agree, chip):
    layout = Layout.packed([40, 140])

    def kept_nothing(op, **tensors):
        y, state = op(**tensors, layout=layout, keep=False)
        assert state is None
        return y

    over = [functools.partial(kept_nothing, op) for op in (trained.ssd_scan, reference.ssd_scan)]
    agree(*over, inputs(layout, 4, 12, 2, 6, False), torch.float32, 5e-5, chip)


def test_strong_decay_neither_overflows_nor_loses_its_gradients(agree, chip):
    layout = Layout.packed([130, 40])
    tensors = inputs(layout, 2, 3, 1, 4, False)
    tensors["dt_TH"] *= 20
    tensors["A_H"] = torch.tensor([-16.0, -1e-4])
    agree(
        *(functools.partial(op, layout=layout) for op in (trained.ssd_scan, reference.ssd_scan)),
        tensors,
        torch.float32,
        2e-4,
        chip,
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_no_gradient_crosses_from_one_document_to_another(poison, chip):
    layout = Layout.packed([30, 20])
    clean = {name: t.to(chip) for name, t in inputs(layout, 2, 3, 1, 4, False).items()}

    def gradients(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        trained.ssd_scan(**leaves, layout=layout, keep=False)[0][30:].sum().backward()
        return {name: leaf.grad[30:] for name, leaf in leaves.items() if "_T" in name}

    first = torch.arange(30, device=chip)
    dirty = {
        name: t.index_fill(0, first, poison) if name in ("x_THP", "B_TGN", "C_TGN") else t
        for name, t in clean.items()
    }
    truth = gradients(clean)
    for name, gradient in gradients(dirty).items():
        assert torch.equal(gradient, truth[name]), name


def test_slices_of_one_projection_are_read_in_place_and_bf16_comes_back_as_bf16(chip, close):
    layout = Layout.packed([5, 30])
    plain = inputs(layout, 2, 12, 1, 6, False)
    together = torch.cat([plain[name].flatten(1) for name in ("x_THP", "B_TGN", "C_TGN")], dim=1).bfloat16()

    def run(values: Tensor, op, **others: Tensor) -> list[Tensor]:
        leaves = [values.detach().requires_grad_(), *(t.detach().requires_grad_() for t in others.values())]
        x, B, C = leaves[0].split([24, 6, 6], dim=1)
        dt, A, D = leaves[1:]
        y, _ = op(
            x.unflatten(1, (2, 12)),
            dt,
            A,
            B.unflatten(1, (1, 6)),
            C.unflatten(1, (1, 6)),
            D,
            layout,
            keep=False,
        )
        y.square().sum().backward()
        return [leaf.grad for leaf in leaves]

    others = {name: plain[name] for name in ("dt_TH", "A_H", "D_H")}
    found = run(together.to(chip), trained.ssd_scan, **{name: t.to(chip) for name, t in others.items()})
    truth = run(together.double(), reference.ssd_scan, **{name: t.double() for name, t in others.items()})
    assert found[0].dtype == torch.bfloat16
    for gradient, expected in zip(found, truth, strict=True):
        close(gradient, expected, 2e-2)
