"""The loops that training runs on a CPU (ops/cpu, each op's compiled.py) against their equations: outputs, every gradient by name."""

import functools

import pytest
import torch
import torch.nn.functional as F
from scan_inputs import inputs

from nanohybrid.ops.causal_conv import numba as conv
from nanohybrid.ops.causal_conv import reference as conv_reference
from nanohybrid.ops.gated_norm import numba as gated
from nanohybrid.ops.gated_norm import reference as gated_reference
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.losses import numba as losses
from nanohybrid.ops.losses.cross_entropy import chunk_loss
from nanohybrid.ops.rms_norm import numba as rms
from nanohybrid.ops.rms_norm import reference as rms_reference
from nanohybrid.ops.squared_relu import numba as relu2
from nanohybrid.ops.squared_relu import reference as relu2_reference
from nanohybrid.ops.ssd_scan import numba as scan
from nanohybrid.ops.ssd_scan import reference as scan_reference

SHAPES = [
    (4, 12, 2, 6),
    (2, 5, 1, 3),
    (3, 1, 3, 8),
    (2, 80, 1, 16),
    (2, 60, 2, 40),
]  # heads, head dimension, groups, state size


def over(op, layout, **options):
    return functools.partial(op, layout=layout, **options)


@pytest.mark.parametrize("state", [False, True], ids=["from zeros", "from a state"])
def test_the_scan_is_the_recurrence(layout, state, agree):
    tensors = inputs(layout, *SHAPES[0], state=state)
    agree(over(scan.ssd_scan, layout), over(scan_reference.ssd_scan, layout), tensors, torch.float32, 5e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_scan_for_other_heads_and_groups_as_training_runs_it(shape, agree):
    layout = Layout.packed([5, 130, 63])
    fast, truth = (
        lambda op=op, **t: op(**t, layout=layout, keep=False)[0]
        for op in (scan.ssd_scan, scan_reference.ssd_scan)
    )
    agree(fast, truth, inputs(layout, *shape, state=False), torch.float32, 5e-5)


def test_the_scans_decay_gradient_stays_exact_over_a_long_document(agree):
    """The running sum is a difference of large numbers: set anew on the way, its error does not grow with the length."""
    layout = Layout.packed([1000])
    agree(
        over(scan.ssd_scan, layout),
        over(scan_reference.ssd_scan, layout),
        inputs(layout, 1, 4, 1, 4, state=False),
        torch.float32,
        1e-4,
    )


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
    parts = {
        "x_THP": x.unflatten(1, (H, P)),
        "B_TGN": B.unflatten(1, (G, N)),
        "C_TGN": C.unflatten(1, (G, N)),
    }
    y, _ = scan.ssd_scan(**parts, **others, layout=layout)
    y.sum().backward()
    found, whole.grad = whole.grad, None
    truth, _ = scan_reference.ssd_scan(
        **{name: t.double() for name, t in (parts | others).items()}, layout=layout
    )
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


def conv_inputs(layout, C, W):
    return {"x_TC": torch.randn(layout.tokens, C), "weight_CW": torch.randn(C, W), "bias_C": torch.randn(C)}


@pytest.mark.parametrize("C, W", [(6, 4), (150, 3), (5, 1)])
def test_the_conv_with_its_silu(layout, C, W, agree):
    def fast(**tensors):
        return conv.conv_silu(**tensors, layout=layout, keep=False)[0]

    def truth(**tensors):
        return F.silu(conv_reference.causal_conv(**tensors, layout=layout, keep=False)[0])

    agree(fast, truth, conv_inputs(layout, C, W), torch.float32, 1e-5)


def test_the_conv_keeps_what_the_next_call_needs_and_goes_on_from_it():
    layout, tensors = Layout.packed([7, 2]), conv_inputs(Layout.packed([7, 2]), 6, 4)
    _, kept = conv.conv_silu(**tensors, layout=layout)
    torch.testing.assert_close(kept, conv_reference.causal_conv(**tensors, layout=layout)[1])
    found, _ = conv.conv_silu(**tensors, layout=layout, initial_SWC=kept)
    torch.testing.assert_close(
        found, F.silu(conv_reference.causal_conv(**tensors, layout=layout, initial_SWC=kept)[0])
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_the_conv_sees_no_other_document(poison):
    layout = Layout.packed([7, 2, 5])
    tensors = conv_inputs(layout, 6, 4)

    def run(x_TC):
        x = x_TC.clone().requires_grad_()
        y, _ = conv.conv_silu(**(tensors | {"x_TC": x}), layout=layout)
        y[9:].sum().backward()
        return y[9:], x.grad[9:]

    dirty = tensors["x_TC"].clone()
    dirty[:9] = poison
    for clean, after in zip(run(tensors["x_TC"]), run(dirty), strict=True):
        assert torch.equal(clean, after)


@pytest.mark.parametrize("T, D, groups", [(1, 12, 1), (5, 12, 3), (130, 160, 8), (3, 60, 60)])
def test_the_gated_norm(T, D, groups, agree):
    tensors = {"y_TD": torch.randn(T, D), "z_TD": torch.randn(T, D) * 3, "weight_D": torch.randn(D)}
    fast, truth = (
        functools.partial(op, groups=groups, eps=1e-5)
        for op in (gated.gated_norm, gated_reference.gated_norm)
    )
    agree(fast, truth, tensors, torch.float32, 1e-5)


@pytest.mark.parametrize("shape", [(1, 12), (130, 33), (5, 3, 16)], ids=str)
def test_the_norm(shape, agree):
    tensors = {"x": torch.randn(shape), "weight": torch.randn(shape[-1])}
    agree(
        functools.partial(rms.rms_norm, eps=1e-5),
        functools.partial(rms_reference.rms_norm, eps=1e-5),
        tensors,
        torch.float32,
        1e-5,
    )


def test_under_autocast_the_norm_is_what_its_readers_would_have_cast():
    x, weight = torch.randn(9, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = rms.rms_norm(x, weight, 1e-5)
    assert torch.equal(found, rms.rms_norm(x, weight, 1e-5).bfloat16())
    found.backward(torch.ones_like(found))
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1,), (3, 1000), (5000,)], ids=str)
def test_the_squared_relu(shape, agree):
    agree(relu2.squared_relu, relu2_reference.squared_relu, {"x": torch.randn(shape)}, torch.float32, 1e-6)


def test_the_squared_relu_hides_nothing_that_is_no_number():
    x = torch.tensor([float("nan"), -1.0, 2.0], requires_grad=True)
    y = relu2.squared_relu(x)
    y.sum().backward()
    assert y.isnan().tolist() == x.grad.isnan().tolist() == [True, False, False]


def test_in_bf16_each_is_the_equation_rounded_once():
    """Everything that has bf16 inputs: outputs within one rounding, gradients within the rounding of what comes in and goes out."""
    layout = Layout.packed([40, 3])
    x, z = (torch.randn(43, 48).bfloat16() for _ in range(2))
    weight, taps = torch.randn(48), (torch.randn(48, 4), torch.randn(48))
    cases = {
        "conv": (
            lambda x: conv.conv_silu(x, *taps, layout)[0],
            lambda x: F.silu(conv_reference.causal_conv(x, *taps, layout)[0]),
        ),
        "gated": (
            lambda x: gated.gated_norm(x, z, weight, 3, 1e-5),
            lambda x: gated_reference.gated_norm(x, z.double(), weight, 3, 1e-5),
        ),
        "relu2": (relu2.squared_relu, relu2_reference.squared_relu),
        "norm": (lambda x: rms.rms_norm(x, weight, 1e-5), lambda x: rms_reference.rms_norm(x, weight, 1e-5)),
    }
    for name, (fast, truth) in cases.items():
        narrow, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        found, exact = fast(narrow), truth(wide)
        found.sum().backward()
        exact.sum().backward()
        assert found.dtype == torch.bfloat16, name
        torch.testing.assert_close(found.double(), exact.double(), atol=1e-5, rtol=2**-8)
        torch.testing.assert_close(narrow.grad.double(), wide.grad, atol=1e-5, rtol=2**-8)


@pytest.mark.parametrize("V", [1, 3, 64, 1000])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)], ids=["fp32", "bf16"]
)
def test_loss_and_slope_of_logits(V, dtype, tolerance):
    logits, targets = (torch.randn(7, V) * 5).to(dtype), torch.randint(V, (7,))
    loss, slope = chunk_loss(logits.double(), targets, True)
    alone, none = losses.cross_entropy(logits.clone(), targets, False)
    found, written = losses.cross_entropy(logits, targets, True)
    assert none is None and written.data_ptr() == logits.data_ptr() and torch.equal(alone, found)
    torch.testing.assert_close(found.double(), loss, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(written.double(), slope, atol=tolerance, rtol=tolerance)


def test_a_loss_of_what_is_no_number_is_none():
    logits = torch.randn(2, 100)
    logits[0, 70] = float("nan")
    loss, _ = losses.cross_entropy(logits, torch.tensor([3, 3]), False)
    assert loss.isnan().tolist() == [True, False]
