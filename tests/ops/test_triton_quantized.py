"""Triton products with quantized weights against the formats' definition in float64: on a GPU, or in Triton's
interpreter.
"""

import pytest
import torch

from nanohybrid.ops import quantized
from nanohybrid.ops.quantized import reference
from nanohybrid.ops.quantized.triton import linear

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def check(M: int, N: int, K: int, format: str, dtype: torch.dtype, chip: torch.device, close) -> None:
    codes, scales = quantized.quantize(torch.randn(N, K), format)
    x = torch.randn(M, K + 3).to(dtype)[:, :K]
    found = linear(x.to(chip), codes.to(chip), scales.to(chip))
    assert found.dtype == dtype
    close(found, x.double() @ reference.dequantize(codes, scales).T, TOLERANCE[dtype])


@pytest.mark.parametrize("M, N, K", [(1, 19, 256), (5, 32, 96), (17, 33, 160)])
@pytest.mark.parametrize("format", quantized.FORMATS)
def test_triton_quantized_linear_equals_the_product_of_the_dequantized_weight(format, M, N, K, chip, close):
    check(M, N, K, format, torch.float32, chip, close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", quantized.FORMATS)
def test_triton_quantized_linear_in_fp16_and_bf16(format, dtype, chip, close):
    check(3, 20, 256, format, dtype, chip, close)


def test_triton_quantized_linear_with_one_scale_per_row_of_any_width(chip, close):
    check(2, 5, 77, "int8", torch.float32, chip, close)


def test_triton_quantized_linear_decodes_every_fp8_code(chip):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes.float().isfinite()
    found = linear(torch.ones(1, 1, device=chip), codes[:, None].to(chip), torch.ones(256, 1, device=chip))
    assert torch.equal(found[0].cpu()[finite], codes.float()[finite])


def test_triton_quantized_linear_preserves_leading_dimensions_and_takes_large_batches(chip, close):
    codes, scales = quantized.quantize(torch.randn(7, 64), "int8")
    for shape in ((2, 3), (5, 13)):  # 65 rows are more than it takes
        x = torch.randn(*shape, 64)
        found = linear(x.to(chip), codes.to(chip), scales.to(chip))
        close(found, x.double() @ reference.dequantize(codes, scales).T, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("N, K", [(22656, 4480), (4480, 10240), (15680, 4480), (131072, 4480), (100, 1056)])
@pytest.mark.parametrize("M", [1, 2, 7, 16, 33, 64])
@pytest.mark.parametrize("format", quantized.FORMATS)
def test_triton_quantized_linear_on_a_gpu(format, M, N, K, chip, close):
    check(M, N, K, format, torch.bfloat16, chip, close)
