"""Mamba-2's Triton kernels against their equations in float64: on a GPU, or in Triton's interpreter."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanohybrid.ops.causal_conv import reference as conv_reference
from nanohybrid.ops.causal_conv import triton as conv_triton
from nanohybrid.ops.gated_norm import reference as norm_reference
from nanohybrid.ops.gated_norm import triton as norm_triton
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.mamba_step import triton as step_triton
from nanohybrid.ops.residual_norm import reference as residual_reference
from nanohybrid.ops.residual_norm import torch as residual_fused
from nanohybrid.ops.residual_norm import triton as residual_triton
from nanohybrid.ops.ssd_step import reference as step_reference

RAGGED = {
    "short documents": Layout.packed([1, 2, 3, 5, 17]),
    "continuations": Layout.with_cache(
        [5, 30, 1, 2], [125, 200, 2, 0], [3, 0, 2, 1], [range(5), range(5, 15), [20], [21]], 32
    ),
}
# bf16: the interpreter truncates, a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def conv_inputs(
    layout: Layout, C: int, W: int, dtype: torch.dtype, chip: torch.device
) -> dict[str, Tensor | None]:
    stored = torch.randn(layout.sequences, W - 1, C) if layout.continues else None
    wide = torch.randn(layout.tokens, C + 7)  # as in the mixer, a slice of wider rows
    tensors = {"x_TC": wide, "weight_CW": torch.randn(C, W), "bias_C": torch.randn(C), "initial_SWC": stored}
    narrow = {name: None if t is None else t.to(dtype).to(chip) for name, t in tensors.items()}
    return narrow | {"x_TC": narrow["x_TC"][:, 3 : 3 + C]}


def wide(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.double().cpu() for name, t in tensors.items()}


def check_conv(layout: Layout, C: int, W: int, dtype: torch.dtype, chip: torch.device, close) -> None:
    tensors = conv_inputs(layout, C, W, dtype, chip)
    expected, expected_last = conv_reference.causal_conv(**wide(tensors), layout=layout)
    found, last = conv_triton.causal_conv(**tensors, layout=layout)
    assert found.dtype == torch.float32 and last.dtype == dtype
    close(found, expected, 1e-5)
    assert torch.equal(last.double().cpu(), expected_last)
    through, last = conv_triton.conv_silu(**tensors, layout=layout, output_final_state=False)
    assert through.dtype == dtype and last is None
    close(through, F.silu(expected), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", RAGGED)
def test_triton_causal_conv_equals_its_equation(name, dtype, chip, close):
    check_conv(RAGGED[name], 19, 4, dtype, chip, close)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_triton_causal_conv_resets_state_at_document_boundaries(poison, chip):
    layout = Layout.packed([7, 2, 5])
    tensors = conv_inputs(layout, 6, 4, torch.float32, chip)
    clean, clean_last = conv_triton.causal_conv(**tensors, layout=layout)
    tensors["x_TC"][:9] = poison
    found, last = conv_triton.causal_conv(**tensors, layout=layout)
    assert torch.equal(found[9:], clean[9:]) and torch.equal(last[2], clean_last[2])


@pytest.mark.gpu
@pytest.mark.parametrize("C, W", [(1, 2), (256, 3), (257, 4), (12288, 4)])
@pytest.mark.parametrize("lengths", [[1], [4096], [3, 1000, 16, 17, 128]], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_triton_causal_conv_on_a_gpu(lengths, C, W, dtype, chip, close):
    check_conv(Layout.packed(lengths), C, W, dtype, chip, close)


STEPS = [(3, 80, 1, 16), (4, 12, 2, 6), (2, 16, 1, 128)]  # heads, head dimension, groups, state size


def check_step(
    S: int,
    H: int,
    P: int,
    G: int,
    N: int,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    limit,
    chip: torch.device,
    close,
) -> None:
    """One token of S sequences in scattered slots. The second sequence begins here, in a slot full of NaN."""
    C, W, slots = H * P + 2 * G * N, 4, torch.randperm(S + 3)[:S]
    layout = Layout.with_cache(
        [1] * S, [0 if i == 1 else 5 + i for i in range(S)], slots.tolist(), [[i] for i in range(S)], 256
    )
    x, dt = torch.randn(S, C + 5).to(dtype)[:, 2 : 2 + C], (torch.randn(S, H) * 4).to(dtype)
    weight, bias = torch.randn(C, W).to(dtype), torch.randn(C).to(dtype)
    dt_bias, A_log, D = torch.randn(H).to(dtype), torch.randn(H).to(dtype), torch.randn(H).to(dtype)
    conv_pool, ssm_pool = torch.randn(S + 3, W - 1, C).to(dtype), torch.randn(S + 3, H, P, N).to(state_dtype)
    before = conv_pool.double(), ssm_pool.double()
    for pool in (conv_pool, ssm_pool):
        if S > 1:
            pool[slots[1]] = float("nan")
    on_chip = [t.to(chip) for t in (x, dt, weight, bias, dt_bias, A_log, D, conv_pool, ssm_pool)]
    found = step_triton.mamba_step(*on_chip, layout, G, limit)
    # the expected values, op by op
    fresh = torch.tensor([position == 0 for position in layout.positions])
    conv_rows, ssm_rows = (pool[slots].clone() for pool in before)
    conv_rows[fresh], ssm_rows[fresh] = 0, 0
    y, conv_rows = conv_reference.causal_conv(
        x.double(), weight.double(), bias.double(), Layout.packed([1] * S), conv_rows
    )
    x_SD, B_SM, C_SM = (
        F.silu(y).to(dtype).double().split([H * P, G * N, G * N], dim=-1)
    )  # rounded as the op specifies
    step_SH = F.softplus(dt.double() + dt_bias.double()).clamp(*limit)
    group = B_SM.unflatten(-1, (G, N)), C_SM.unflatten(-1, (G, N))
    expected, ssm_rows = step_reference.ssd_step(
        x_SD.unflatten(-1, (H, P)), step_SH, -A_log.double().exp(), *group, D.double(), ssm_rows
    )
    assert found.dtype == torch.float32
    close(found, expected, 1e-5 if dtype == torch.float32 else TOLERANCE[dtype])
    close(
        on_chip[8][slots.to(chip)],
        ssm_rows,
        max(1e-5 if dtype == torch.float32 else TOLERANCE[dtype], TOLERANCE[state_dtype]),
    )
    assert torch.equal(on_chip[7][slots.to(chip)].double().cpu(), conv_rows)
    others = [slot for slot in range(S + 3) if slot not in slots.tolist()]
    assert torch.equal(on_chip[8][others].double().cpu(), before[1][others])
    assert torch.equal(on_chip[7][others].double().cpu(), before[0][others])


@pytest.mark.parametrize(
    "dtype, state_dtype",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("shape", STEPS, ids=str)
def test_mamba_step_equals_its_equation_and_does_not_change_other_slots(
    shape, dtype, state_dtype, chip, close
):
    check_step(3, *shape, dtype, state_dtype, (0.0, math.inf), chip, close)


def test_mamba_step_clamps_dt_to_its_limits(chip, close):
    check_step(2, 2, 16, 1, 16, torch.float32, torch.float32, (0.5, 1.5), chip, close)


@pytest.mark.gpu
@pytest.mark.parametrize("S", [1, 2, 8, 33, 128])
@pytest.mark.parametrize(
    "shape", [(128, 80, 8, 128), (32, 64, 8, 128), (128, 64, 1, 256), (5, 40, 5, 16)], ids=str
)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16], ids=str)
def test_mamba_step_on_a_gpu(S, shape, state_dtype, chip, close):
    check_step(S, *shape, torch.bfloat16, state_dtype, (0.0, math.inf), chip, close)


def check_norms(T: int, D: int, groups: int, dtype: torch.dtype, chip: torch.device, close) -> None:
    z, weight, y = torch.randn(T, 3 * D).to(dtype)[:, D : 2 * D], torch.randn(D).to(dtype), torch.randn(T, D)
    found = norm_triton.gated_norm(y.to(chip), z.to(chip), weight.to(chip), groups, 1e-5)
    assert found.dtype == dtype
    close(
        found,
        norm_reference.gated_norm(y.double(), z.double(), weight.double(), groups, 1e-5),
        TOLERANCE[dtype],
    )
    h, update = torch.randn(T, D).to(dtype), torch.randn(T, D).to(dtype)
    stream, normed = residual_triton.residual_norm(h.to(chip), update.to(chip), weight.to(chip), 1e-5)
    assert stream.dtype == normed.dtype == dtype
    close(stream, h.double() + update.double(), TOLERANCE[dtype])
    close(
        normed,
        residual_reference.residual_norm(
            (h + update).double(), torch.zeros(T, D).double(), weight.double(), 1e-5
        )[1],
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("T, D, groups", [(1, 8, 1), (3, 60, 3), (2, 320, 2)])
def test_triton_norms_equal_their_equations(T, D, groups, dtype, chip, close):
    check_norms(T, D, groups, dtype, chip, close)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "T, D, groups", [(1, 10240, 8), (2048, 10240, 8), (7, 4480, 1), (1000, 5120, 1), (64, 2048, 8)]
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_triton_norms_on_a_gpu(T, D, groups, dtype, chip, close):
    check_norms(T, D, groups, dtype, chip, close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_torch_residual_norm_equals_its_equation(dtype, close):
    h, update, weight = torch.randn(4, 24).to(dtype), torch.randn(4, 24).to(dtype), torch.randn(24).to(dtype)
    stream, normed = residual_fused.residual_norm(h, update, weight, 1e-5)
    expected, expected_normed = residual_reference.residual_norm(h, update, weight, 1e-5)
    assert torch.equal(stream, expected)
    close(normed, expected_normed, 1e-12 if dtype == torch.float64 else TOLERANCE[dtype])
