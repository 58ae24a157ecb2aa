"""The numba forms, which training on a CPU runs, against their equations: outputs, and every gradient by
name.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from scan_inputs import inputs, outputs_of, scan_of

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


def scans(layout):
    return scan_of(scan, layout), scan_of(scan_reference, layout)


@pytest.mark.parametrize("state", [False, True], ids=["from zeros", "from a state"])
def test_numba_ssd_scan_equals_the_recurrence(layout, state, agree):
    tensors = inputs(layout, *SHAPES[0], state=state)
    agree(*scans(layout), tensors, torch.float32, 5e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numba_ssd_scan_as_in_training_equals_the_recurrence_for_other_heads_and_groups(shape, agree):
    layout = Layout.packed([5, 130, 63])
    forms = outputs_of(scan, layout), outputs_of(scan_reference, layout)
    agree(*forms, inputs(layout, *shape, state=False), torch.float32, 5e-5)


def test_numba_ssd_scan_decay_gradient_stays_accurate_over_a_long_document(agree):
    """The running sum is a difference of large numbers. It is reset to its exact value every ANCHOR
    tokens.
    """
    layout = Layout.packed([1000])
    agree(*scans(layout), inputs(layout, 1, 4, 1, 4, state=False), torch.float32, 1e-4)


def test_numba_ssd_scan_has_accurate_gradients_with_strong_decay(agree):
    layout = Layout.packed([130, 40])
    tensors = inputs(layout, 2, 3, 1, 4)
    tensors["dt_TH"] = tensors["dt_TH"] * 20
    tensors["A_H"] = torch.tensor([-16.0, -1e-4])
    agree(*scans(layout), tensors, torch.float32, 2e-4)


def test_numba_ssd_scan_takes_strided_bf16_rows_and_sums_in_fp32():
    """As in training, where x, B and C are slices of one tensor."""
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
    y, _ = scan_of(scan, layout)(**parts, **others)
    y.sum().backward()
    found, whole.grad = whole.grad, None
    expected, _ = scan_of(scan_reference, layout)(
        **{name: t.double() for name, t in (parts | others).items()}
    )
    expected.sum().backward()
    assert y.dtype == torch.float32
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found.float() - whole.grad.float()).abs().max() < 0.01 * whole.grad.abs().max()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_numba_ssd_scan_resets_state_at_document_boundaries(poison):
    layout = Layout.packed([130, 40, 20])
    tensors = inputs(layout, 2, 3, 1, 4, state=False)

    def run(x_THP, B_TGN):
        leaves = [t.clone().requires_grad_() for t in (x_THP, B_TGN)]
        y, state = scan_of(scan, layout)(**(tensors | {"x_THP": leaves[0], "B_TGN": leaves[1]}))
        y[170:].sum().backward()
        return y[170:], state[2], leaves[0].grad[170:]

    dirty_x, dirty_B = tensors["x_THP"].clone(), tensors["B_TGN"].clone()
    dirty_x[:170], dirty_B[:170] = poison, poison
    for clean, dirty in zip(run(tensors["x_THP"], tensors["B_TGN"]), run(dirty_x, dirty_B), strict=True):
        assert torch.equal(clean, dirty)


def test_numba_ssd_scan_gives_the_same_bits_on_one_thread_and_on_two():
    layout = Layout.packed([300, 20])
    tensors = {name: t.requires_grad_() for name, t in inputs(layout, 8, 32, 2, 32, state=False).items()}
    found = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y = outputs_of(scan, layout)(**tensors)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(tensors.values()))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def conv_inputs(layout, C, W):
    return {"x_TC": torch.randn(layout.tokens, C), "weight_CW": torch.randn(C, W), "bias_C": torch.randn(C)}


@pytest.mark.parametrize("C, W", [(6, 4), (150, 3), (5, 1)])
def test_numba_conv_silu_equals_its_equation(layout, C, W, agree):
    def fast(**tensors):
        return conv.conv_silu(**tensors, layout=layout, output_final_state=False)[0]

    def expected(**tensors):
        return F.silu(conv_reference.causal_conv(**tensors, layout=layout, output_final_state=False)[0])

    agree(fast, expected, conv_inputs(layout, C, W), torch.float32, 1e-5)


def test_numba_conv_silu_returns_its_final_state_and_continues_from_it():
    layout, tensors = Layout.packed([7, 2]), conv_inputs(Layout.packed([7, 2]), 6, 4)
    _, state = conv.conv_silu(**tensors, layout=layout)
    torch.testing.assert_close(state, conv_reference.causal_conv(**tensors, layout=layout)[1])
    found, _ = conv.conv_silu(**tensors, layout=layout, initial_SWC=state)
    torch.testing.assert_close(
        found, F.silu(conv_reference.causal_conv(**tensors, layout=layout, initial_SWC=state)[0])
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_numba_conv_silu_resets_state_at_document_boundaries(poison):
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
def test_numba_gated_norm_equals_its_equation(T, D, groups, agree):
    tensors = {"y_TD": torch.randn(T, D), "z_TD": torch.randn(T, D) * 3, "weight_D": torch.randn(D)}
    fast, expected = (
        functools.partial(op, groups=groups, eps=1e-5)
        for op in (gated.gated_norm, gated_reference.gated_norm)
    )
    agree(fast, expected, tensors, torch.float32, 1e-5)


@pytest.mark.parametrize("shape", [(1, 12), (130, 33), (5, 3, 16)], ids=str)
def test_numba_rms_norm_equals_its_equation(shape, agree):
    tensors = {"x": torch.randn(shape), "weight": torch.randn(shape[-1])}
    agree(
        functools.partial(rms.rms_norm, eps=1e-5),
        functools.partial(rms_reference.rms_norm, eps=1e-5),
        tensors,
        torch.float32,
        1e-5,
    )


def test_numba_rms_norm_is_cast_to_the_autocast_dtype():
    x, weight = torch.randn(9, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = rms.rms_norm(x, weight, 1e-5)
    assert torch.equal(found, rms.rms_norm(x, weight, 1e-5).bfloat16())
    found.backward(torch.ones_like(found))
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1,), (3, 1000), (5000,)], ids=str)
def test_numba_squared_relu_equals_its_equation(shape, agree):
    agree(relu2.squared_relu, relu2_reference.squared_relu, {"x": torch.randn(shape)}, torch.float32, 1e-6)


def test_numba_squared_relu_propagates_nan():
    x = torch.tensor([float("nan"), -1.0, 2.0], requires_grad=True)
    y = relu2.squared_relu(x)
    y.sum().backward()
    assert y.isnan().tolist() == x.grad.isnan().tolist() == [True, False, False]


def test_numba_forms_in_bf16_equal_their_equations_up_to_rounding():
    """Outputs are within one rounding, gradients within the rounding of inputs and outputs."""
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
    for name, (fast, expected) in cases.items():
        narrow, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        found, exact = fast(narrow), expected(wide)
        found.sum().backward()
        exact.sum().backward()
        assert found.dtype == torch.bfloat16, name
        torch.testing.assert_close(found.double(), exact.double(), atol=1e-5, rtol=2**-8)
        torch.testing.assert_close(narrow.grad.double(), wide.grad, atol=1e-5, rtol=2**-8)


@pytest.mark.parametrize("V", [1, 3, 64, 1000])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)], ids=["fp32", "bf16"]
)
def test_numba_cross_entropy_loss_and_gradient_equal_those_in_float64(V, dtype, tolerance):
    logits, targets = (torch.randn(7, V) * 5).to(dtype), torch.randint(V, (7,))
    loss, gradient = chunk_loss(logits.double(), targets, True)
    alone, none = losses.cross_entropy(logits.clone(), targets, False)
    found, written = losses.cross_entropy(logits, targets, True)
    assert none is None and written.data_ptr() == logits.data_ptr() and torch.equal(alone, found)
    torch.testing.assert_close(found.double(), loss, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(written.double(), gradient, atol=tolerance, rtol=tolerance)


def test_numba_cross_entropy_of_nan_is_nan():
    logits = torch.randn(2, 100)
    logits[0, 70] = float("nan")
    loss, _ = losses.cross_entropy(logits, torch.tensor([3, 3]), False)
    assert loss.isnan().tolist() == [True, False]
