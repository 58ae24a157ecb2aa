"""Linear layers on packed weights: every form, odd sizes, rows of every tile, and the plain instructions of other processors."""

import numba
import numpy as np
import pytest
import torch

from nanohybrid.ops import quantized
from nanohybrid.ops.cpu import available

if not available():
    pytest.skip("numba is not installed", allow_module_level=True)

from nanohybrid.ops.cpu.compiled import ours
from nanohybrid.ops.cpu.packed import matmul, pack, unpack
from nanohybrid.ops.cpu.tile import FORMS, make_tiles


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


@pytest.mark.parametrize("form,inputs", [("bf16", 72), ("bf16", 33), ("int8", 384), ("int8", 40), ("int4", 96)])
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


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
def test_a_processor_without_bfloat16_products_computes_the_same(form):
    packed, weight = packed_of(form, 64, 128)
    tiles, index = make_tiles([(form, 2, 4)], paired=False), FORMS.index(form)

    @numba.njit
    def run(w, step, x, out, groups, pairs):
        tiles(index, 2, 4, w, step, 4 * step, x, out, 256, groups, pairs, 0)

    x, out = torch.randn(2, 128).bfloat16(), torch.zeros(2, 64)
    rows = x.view(2, 64, 2).transpose(0, 1).contiguous()
    run(packed.data.data_ptr(), packed.data.shape[-1], rows.data_ptr(), out.data_ptr(), packed.groups, packed.pairs)
    np.testing.assert_allclose(out.numpy(), (x.float() @ weight.T).numpy(), atol=1e-5)


def test_kernels_are_kept_only_where_the_directory_is_this_user_s(tmp_path, monkeypatch):
    assert ours(tmp_path / "new" / "place") and (tmp_path / "new" / "place").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    assert not ours(tmp_path / "file" / "below")
    monkeypatch.setattr("os.getuid", lambda: tmp_path.stat().st_uid + 1)
    assert not ours(tmp_path)


def test_a_weight_of_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="known are bf16, int8 and int4"):
        pack(torch.zeros(4, 4), "int3")
