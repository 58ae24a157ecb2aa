"""The loops that training runs on a CPU (ops/cpu, each op's compiled.py) against their equations: outputs, every gradient by name."""

import functools

import pytest
import torch
from scan_inputs import inputs

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan import compiled as scan
from nanohybrid.ops.ssd_scan import reference as scan_reference

SHAPES = [(4, 12, 2, 6), (2, 5, 1, 3), (3, 1, 3, 8), (2, 80, 1, 16), (2, 60, 2, 40)]  # heads, head dimension, groups, state size


def over(op, layout, **options):
    return functools.partial(op, layout=layout, **options)


@pytest.mark.parametrize("state", [False, True], ids=["from zeros", "from a state"])
def test_the_scan_is_the_recurrence(layout, state, agree):
    tensors = inputs(layout, *SHAPES[0], state=state)
    agree(over(scan.ssd_scan, layout), over(scan_reference.ssd_scan, layout), tensors, torch.float32, 5e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_scan_for_other_heads_and_groups_as_training_runs_it(shape, agree):
    layout = Layout.packed([5, 130, 63])
    fast, truth = (lambda op=op, **t: op(**t, layout=layout, keep=False)[0] for op in (scan.ssd_scan, scan_reference.ssd_scan))
    agree(fast, truth, inputs(layout, *shape, state=False), torch.float32, 5e-5)


def test_the_scans_decay_gradient_stays_exact_over_a_long_document(agree):
    """The running sum is a difference of large numbers: set anew on the way, its error does not grow with the length."""
    layout = Layout.packed([1000])
    agree(over(scan.ssd_scan, layout), over(scan_reference.ssd_scan, layout), inputs(layout, 1, 4, 1, 4, state=False), torch.float32, 1e-4)


def test_the_scan_with_strong_decay(agree):
    layout = Layout.packed([130, 40])
    tensors = inputs(layout, 2, 3, 1, 4)
    tensors["dt_TH"] = tensors["dt_TH"] * 20
    tensors["A_H"] = torch.tensor([-16.0, -1e-4])
    agree(over(scan.ssd_scan, layout), over(scan_reference.ssd_scan, layout), tensors, torch.float32, 2e-4)


def test_the_scan_takes_bf16_rows_with_gaps_and_sums_in_fp32():
    """As training gives them: x, B and C are parts of one tensor."""
    layout = Layout.packed([40, 3])
    H, P, G, N = 4, 12, 2, 6
    whole = torch.randn(43, H * P + 2 * G * N).bfloat16().requires_grad_()
    x, B, C = whole.split([H * P, G * N, G * N], dim=1)
    others = {name: t for name, t in inputs(layout, H, P, G, N, state=False).items() if name[0] not in "xBC"}
    parts = {"x_THP": x.unflatten(1, (H, P)), "B_TGN": B.unflatten(1, (G, N)), "C_TGN": C.unflatten(1, (G, N))}
    y, _ = scan.ssd_scan(**parts, **others, layout=layout)
    y.sum().backward()
    found, whole.grad = whole.grad, None
    truth, _ = scan_reference.ssd_scan(**{name: t.double() for name, t in (parts | others).items()}, layout=layout)
    truth.sum().backward()
    assert y.dtype == torch.float32
    assert (y - truth).abs().max() < 1e-5 * truth.abs().max()
    assert (found.float() - whole.grad.float()).abs().max() < 0.01 * whole.grad.abs().max()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_document_never_sees_the_one_before_it(poison):
    layout = Layout.packed([130, 40, 20])
    tensors = inputs(layout, 2, 3, 1, 4, state=False)

    def run(x_THP, B_TGN):
        leaves = [t.clone().requires_grad_() for t in (x_THP, B_TGN)]
        y, state = scan.ssd_scan(**(tensors | {"x_THP": leaves[0], "B_TGN": leaves[1]}), layout=layout)
        y[170:].sum().backward()
        return y[170:], state[2], leaves[0].grad[170:]

    dirty_x, dirty_B = tensors["x_THP"].clone(), tensors["B_TGN"].clone()
    dirty_x[:170], dirty_B[:170] = poison, poison
    for clean, dirty in zip(run(tensors["x_THP"], tensors["B_TGN"]), run(dirty_x, dirty_B), strict=True):
        assert torch.equal(clean, dirty)


def test_the_scan_gives_the_same_bits_on_one_thread_and_on_two():
    layout = Layout.packed([300, 20])
    tensors = {name: t.requires_grad_() for name, t in inputs(layout, 8, 32, 2, 32, state=False).items()}
    found = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y, _ = scan.ssd_scan(**tensors, layout=layout, keep=False)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(tensors.values()))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
