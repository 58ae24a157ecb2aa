"""Linear layers on packed weights: every form, odd sizes, rows of every tile, and the plain instructions of other processors."""

import numba
import numpy as np
import pytest
import torch

from nanohybrid.ops import quantized
from nanohybrid.ops.numba import available

if not available():
    pytest.skip("numba is not installed", allow_module_level=True)

from nanohybrid.executors.cpu.kernels.gemm_int8 import OFFSET, fix_rows
from nanohybrid.executors.cpu.kernels.gemm_tile import FORMS, make_tiles
from nanohybrid.executors.cpu.kernels.packing import matmul, pack, unpack
from nanohybrid.ops.numba.jit import ours


def packed_of(form, outputs, inputs):
    weight = torch.randn(outputs, inputs) / inputs**0.5
    if form == "bf16":
        return pack(weight.bfloat16()), weight.bfloat16().float()
    codes, scales = quantized.quantize(weight, form)
    return pack(codes, form, scales), quantized.dequantize(codes, scales, torch.float32)


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("outputs,inputs", [(1, 32), (64, 96), (100, 160), (513, 256)])
def test_panels_hold_the_weight(form, outputs, inputs):
    packed, weight = packed_of(form, outputs, inputs)
    assert torch.equal(unpack(packed), weight)


@pytest.mark.parametrize(
    "form,inputs", [("bf16", 72), ("bf16", 33), ("int8", 384), ("int8", 40), ("int4", 96)]
)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 25, 400])
def test_products_are_those_of_the_weight_that_the_codes_stand_for(form, inputs, rows):
    packed, weight = packed_of(form, 100, inputs)
    x = torch.randn(rows, inputs).bfloat16()
    expected = x.double() @ weight.double().T
    assert (matmul(x, packed).double() - expected).abs().max() <= 0.006 * expected.abs().max()


def test_rows_with_a_stride_and_more_dimensions():
    packed, weight = packed_of("bf16", 20, 64)
    x = torch.randn(2, 3, 128).bfloat16()[..., ::2]
    expected = x.float() @ weight.T
    assert torch.allclose(matmul(x, packed).float(), expected, atol=0.03)


def test_a_processor_without_bfloat16_products_computes_the_same():
    packed, weight = packed_of("bf16", 64, 128)
    tiles = make_tiles([("bf16", 2, 4)], paired=False)

    @numba.njit
    def run(w, step, x, out, groups, pairs):
        tiles(0, 2, 4, w, groups * step, step, x, out, 256, groups, pairs, 0)

    x, out = torch.randn(2, 128).bfloat16(), torch.zeros(2, 64)
    rows = x.view(2, 64, 2).transpose(0, 1).contiguous()
    run(
        packed.data.data_ptr(),
        packed.data.shape[-1],
        rows.data_ptr(),
        out.data_ptr(),
        packed.groups,
        packed.pairs,
    )
    np.testing.assert_allclose(out.numpy(), (x.float() @ weight.T).numpy(), atol=1e-5)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("rows", [2, 4])  # sums of both bytes side by side, and one after the other
def test_a_processor_without_products_of_bytes_gives_the_same_bits(form, rows):
    packed, _ = packed_of(form, 64, 256)
    tiles, index, offset = make_tiles([(form, rows, 4)], byted=False), FORMS.index(form), OFFSET[form]

    @numba.njit
    def run(w, step, x, fixed, out, groups, pairs):
        fix_rows(x, 0, 1, rows, groups, pairs, offset, fixed)
        tiles(index, rows, 4, w, groups * step, step, fixed, out, 256, groups, pairs, 0)

    x, out = torch.randn(rows, 256).bfloat16(), torch.zeros(rows, 64)
    fixed = torch.zeros(rows, packed.fixed_bytes, dtype=torch.uint8)
    paired = x.view(rows, 128, 2).transpose(0, 1).contiguous()
    run(
        packed.data.data_ptr(), packed.data.shape[-1], paired.data_ptr(), fixed.data_ptr(), out.data_ptr(), packed.groups, packed.pairs
    )  # fmt: skip
    assert torch.equal(matmul(x.float(), packed), out)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_rows_made_integers_lose_less_than_bfloat16_does(form):
    packed, weight = packed_of(form, 64, 512)
    x = torch.randn(5, 512).bfloat16()
    x[:, 7] *= 30  # one of those channels that stand out
    expected = x.double() @ weight.double().T
    assert (matmul(x.float(), packed).double() - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_a_group_of_a_thousand_of_the_largest_weights_does_not_overflow():
    weight = torch.ones(16, 1000)
    codes, scales = quantized.quantize(weight, "int8")
    assert scales.shape[1] == 1
    packed, x = pack(codes, "int8", scales), torch.full((3, 1000), 2.0).bfloat16()
    assert torch.allclose(matmul(x.float(), packed), torch.full((3, 16), 2000.0), rtol=2e-3)
    assert torch.allclose(matmul(-x.float(), packed), torch.full((3, 16), -2000.0), rtol=2e-3)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_is_none_afterwards_and_alone_in_that(form, broken):
    packed, _ = packed_of(form, 64, 256)
    x = torch.randn(9, 256).bfloat16()
    expected = matmul(x, packed)
    x[4, 130] = broken
    found = matmul(x, packed)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(found[others], expected[others]) and not found[4].isfinite().any()


def test_rows_of_zeros_give_zeros():
    packed, _ = packed_of("int8", 64, 256)
    assert (matmul(torch.zeros(3, 256), packed) == 0).all()


def test_kernels_are_kept_only_where_the_directory_is_this_user_s(tmp_path, monkeypatch):
    assert ours(tmp_path / "new" / "place") and (tmp_path / "new" / "place").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    assert not ours(tmp_path / "file" / "below")
    monkeypatch.setattr("os.getuid", lambda: tmp_path.stat().st_uid + 1)
    assert not ours(tmp_path)


def test_a_weight_of_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="known are bf16, int8 and int4"):
        pack(torch.zeros(4, 4), "int3")
