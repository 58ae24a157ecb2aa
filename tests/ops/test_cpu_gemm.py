"""Linear layers on packed weights: every format, odd sizes, every tile, processors without AVX512-BF16 and
AVX512-VNNI.
"""

import numba
import numpy as np
import pytest
import torch

from nanohybrid.ops import quantized
from nanohybrid.ops.numba import available

if not available():
    pytest.skip("numba is not installed", allow_module_level=True)

from nanohybrid.executors.cpu.kernels.gemm_int8 import CODE_OFFSET
from nanohybrid.executors.cpu.kernels.gemm_tile import FORMATS, make_tiles
from nanohybrid.executors.cpu.kernels.packing import matmul, pack, unpack
from nanohybrid.executors.cpu.kernels.quantize_rows import quantize_rows
from nanohybrid.ops.numba.jit import is_private


def packed_of(format, outputs, inputs):
    weight = torch.randn(outputs, inputs) / inputs**0.5
    if format == "bf16":
        return pack(weight.bfloat16()), weight.bfloat16().float()
    codes, scales = quantized.quantize(weight, format)
    return pack(codes, format, scales), quantized.dequantize(codes, scales, torch.float32)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("outputs,inputs", [(1, 32), (64, 96), (100, 160), (513, 256)])
def test_unpack_inverts_pack(format, outputs, inputs):
    packed, weight = packed_of(format, outputs, inputs)
    assert torch.equal(unpack(packed), weight)


@pytest.mark.parametrize(
    "format,inputs", [("bf16", 72), ("bf16", 33), ("int8", 384), ("int8", 40), ("int4", 96)]
)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 25, 400])
def test_matmul_multiplies_by_the_dequantized_weight(format, inputs, rows):
    packed, weight = packed_of(format, 100, inputs)
    x = torch.randn(rows, inputs).bfloat16()
    expected = x.double() @ weight.double().T
    assert (matmul(x, packed).double() - expected).abs().max() <= 0.006 * expected.abs().max()


def test_matmul_takes_strided_rows_and_more_dimensions():
    packed, weight = packed_of("bf16", 20, 64)
    x = torch.randn(2, 3, 128).bfloat16()[..., ::2]
    expected = x.float() @ weight.T
    assert torch.allclose(matmul(x, packed).float(), expected, atol=0.03)


def test_tiles_without_avx512_bf16_compute_the_same_product():
    packed, weight = packed_of("bf16", 64, 128)
    tiles = make_tiles([("bf16", 2, 4)], bf16_instructions=False)

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


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("rows", [2, 4])  # in one pass over both bytes, and in two
def test_tiles_without_avx512_vnni_give_the_same_bits(format, rows):
    packed, _ = packed_of(format, 64, 256)
    tiles, index, offset = (
        make_tiles([(format, rows, 4)], int8_instructions=False),
        FORMATS.index(format),
        CODE_OFFSET[format],
    )

    @numba.njit
    def run(w, step, x, quantized_rows, out, groups, pairs):
        quantize_rows(x, 0, 1, rows, groups, pairs, offset, quantized_rows)
        tiles(index, rows, 4, w, groups * step, step, quantized_rows, out, 256, groups, pairs, 0)

    x, out = torch.randn(rows, 256).bfloat16(), torch.zeros(rows, 64)
    quantized_rows = torch.zeros(rows, packed.quantized_row_bytes, dtype=torch.uint8)
    paired = x.view(rows, 128, 2).transpose(0, 1).contiguous()
    run(
        packed.data.data_ptr(), packed.data.shape[-1], paired.data_ptr(), quantized_rows.data_ptr(),
        out.data_ptr(), packed.groups, packed.pairs,
    )  # fmt: skip
    assert torch.equal(matmul(x.float(), packed), out)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantized_rows_are_more_precise_than_bfloat16(format):
    packed, weight = packed_of(format, 64, 512)
    x = torch.randn(5, 512).bfloat16()
    x[:, 7] *= 30  # an outlier channel
    expected = x.double() @ weight.double().T
    assert (matmul(x.float(), packed).double() - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_matmul_does_not_overflow_with_a_group_of_a_thousand_largest_codes():
    weight = torch.ones(16, 1000)
    codes, scales = quantized.quantize(weight, "int8")
    assert scales.shape[1] == 1
    packed, x = pack(codes, "int8", scales), torch.full((3, 1000), 2.0).bfloat16()
    assert torch.allclose(matmul(x.float(), packed), torch.full((3, 16), 2000.0), rtol=2e-3)
    assert torch.allclose(matmul(-x.float(), packed), torch.full((3, 16), -2000.0), rtol=2e-3)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_matmul_keeps_nan_and_infinity_in_their_row_only(format, broken):
    packed, _ = packed_of(format, 64, 256)
    x = torch.randn(9, 256).bfloat16()
    expected = matmul(x, packed)
    x[4, 130] = broken
    found = matmul(x, packed)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(found[others], expected[others]) and not found[4].isfinite().any()


def test_matmul_of_zero_rows_is_zero():
    packed, _ = packed_of("int8", 64, 256)
    assert (matmul(torch.zeros(3, 256), packed) == 0).all()


def test_cache_directory_must_be_writable_and_owned_by_this_user(tmp_path, monkeypatch):
    assert (
        is_private(tmp_path / "new" / "place")
        and (tmp_path / "new" / "place").stat().st_mode & 0o777 == 0o700
    )
    (tmp_path / "file").write_text("")
    assert not is_private(tmp_path / "file" / "below")
    monkeypatch.setattr("os.getuid", lambda: tmp_path.stat().st_uid + 1)
    assert not is_private(tmp_path)


def test_pack_refuses_an_unknown_format():
    with pytest.raises(ValueError, match="known are bf16, int8 and int4"):
        pack(torch.zeros(4, 4), "int3")
