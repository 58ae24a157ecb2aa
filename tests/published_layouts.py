"""Matrices in the layouts that other programs publish, made and read back by the published definitions.

Each function takes a weight [N, K] and returns its tensors by the last part of their names, and the numbers
that these stand for by the definition, in fp64. Nothing of the package is used, and nothing is fast.
"""

from __future__ import annotations

import numpy as np
import torch

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(numbers: np.ndarray, bits: int) -> torch.Tensor:
    """Unsigned numbers [rows, columns] in int32 words along the columns, the lowest bits first."""
    per_word = 32 // bits
    padded = np.pad(numbers.astype(np.uint64), ((0, 0), (0, -numbers.shape[1] % per_word)))
    result = np.zeros((len(padded), padded.shape[1] // per_word), dtype=np.uint64)
    for place in range(per_word):
        result |= padded[:, place::per_word] << np.uint64(place * bits)
    return torch.from_numpy(result.astype(np.uint32).view(np.int32))


def grid(weight, bits, group, asymmetric, dtype=torch.bfloat16):
    """Unsigned codes [N, K], zero points [N, G] and scales [N, G] in `dtype`, and the numbers (fp64)."""
    rows, columns = weight.shape
    w = weight.double().numpy().reshape(rows, -1, group or columns)
    top = 2**bits - 1
    if asymmetric:
        low, high = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
        scales = torch.from_numpy((high - low) / top).to(dtype)
        zeros = np.clip(np.round(-low / scales.double().numpy()), 0, top)
    else:
        scales = torch.from_numpy(np.abs(w).max(-1) / (2 ** (bits - 1) - 1)).to(dtype)
        zeros = np.full(w.shape[:2], 2 ** (bits - 1), dtype=np.float64)
    exact = scales.double().numpy()[..., None]
    codes = np.clip(np.round(w / exact) + zeros[..., None], 0, top)
    numbers = ((codes - zeros[..., None]) * exact).reshape(rows, columns)
    return codes.reshape(rows, columns).astype(int), zeros.astype(int), scales, torch.from_numpy(numbers)


def packed(weight, bits, group, asymmetric=False):
    """compressed-tensors, pack-quantized."""
    codes, zeros, scales, numbers = grid(weight, bits, group, asymmetric)
    tensors = {
        "weight_packed": words(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if asymmetric:
        tensors["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    return tensors, numbers


def int8_rows(weight, asymmetric=False):
    """compressed-tensors, int-quantized (W8A8)."""
    codes, zeros, scales, numbers = grid(weight, 8, None, asymmetric)
    tensors = {"weight": torch.from_numpy(codes - 128).to(torch.int8), "weight_scale": scales}
    if asymmetric:
        tensors["weight_zero_point"] = torch.from_numpy(zeros - 128).to(torch.int8)
    return tensors, numbers


def e4m3(weight, scales_NK):
    codes = (weight.double() / scales_NK.double()).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    return codes, codes.double() * scales_NK.double()


def fp8_blocks(weight, block=(128, 128), name="weight_scale", dtype=torch.float32, ones=False):
    """FP8 with a scale for each block, at the edges for a smaller one. ones: ModelOpt's axes of 1."""
    rows, columns = weight.shape
    count = (-(-rows // block[0]), -(-columns // block[1]))
    scales = torch.empty(count, dtype=dtype)
    spread = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(count[0]):
        for j in range(count[1]):
            here = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[here].abs().max() / 448
            spread[here] = scales[i, j].double()
    codes, numbers = e4m3(weight, spread)
    return {"weight": codes, name: scales[:, None, :, None] if ones else scales}, numbers


def fp8_rows(weight, column=False):
    """FP8 with a scale for each row: [N] (ModelOpt) or [N, 1] (compressed-tensors)."""
    scales = weight.abs().amax(1).float() / 448
    codes, numbers = e4m3(weight, scales[:, None].expand(weight.shape))
    return {"weight": codes, "weight_scale": scales[:, None] if column else scales}, numbers


def fp8_whole(weight):
    """ModelOpt's FP8: one scale for the matrix, and one for its activations, which is not used."""
    scale = weight.abs().max().float() / 448
    codes, numbers = e4m3(weight, scale.expand(weight.shape))
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.37)}, numbers


def nvfp4(weight, modelopt=True):
    """Two e2m1 codes in a byte, an e4m3 scale for 16 columns, and one fp32 scale for the matrix."""
    rows, columns = weight.shape
    w = weight.double().reshape(rows, -1, 16)
    largest = w.abs().max()
    second = (largest / (6 * 448)).float()
    scales = (w.abs().amax(-1) / 6 / second.double()).float().to(torch.float8_e4m3fn)
    exact = scales.double() * second.double()
    wanted = w / exact[..., None].clamp_min(1e-30)
    values = torch.tensor(E2M1, dtype=torch.float64)
    place = (wanted.abs()[..., None] - values).abs().argmin(-1)
    codes = place + 8 * (wanted < 0)
    numbers = torch.where(wanted < 0, -1.0, 1.0) * values[place] * exact[..., None]
    flat = codes.to(torch.uint8).reshape(rows, columns)
    stored = flat[:, 0::2] | (flat[:, 1::2] << 4)
    if modelopt:
        parts = {"weight": stored, "weight_scale": scales, "weight_scale_2": second}
        return parts | {"input_scale": torch.tensor(0.2)}, numbers.reshape(rows, columns)
    whole = (1 / second.double()).float()
    numbers *= (1 / whole.double()) / second.double()
    parts = {"weight_packed": stored, "weight_scale": scales, "weight_global_scale": whole[None]}
    return parts | {"input_global_scale": torch.tensor([3.0])}, numbers.reshape(rows, columns)


def gptq(weight, bits=4, group=32, asymmetric=False, offset=1):
    """qweight, qzeros, scales, g_idx of GPTQ. offset: 1 for `gptq`, whose zero points are stored less 1."""
    codes, zeros, scales, numbers = grid(weight, bits, group, asymmetric, torch.float16)
    stored = (zeros - offset) % 2**bits
    return {
        "qweight": words(codes, bits).T.contiguous(),
        "qzeros": words(stored.T, bits),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group,
    }, numbers


def awq(weight, group=32):
    """qweight, qzeros, scales of AWQ (gemm): bits 4 i of a word hold the output AWQ_ORDER[i] of its eight."""
    codes, zeros, scales, numbers = grid(weight, 4, group, True, torch.float16)

    def interleaved(rows: np.ndarray) -> torch.Tensor:
        eights = rows.reshape(len(rows), -1, 8)
        return words(eights[:, :, AWQ_ORDER].reshape(len(rows), -1), 4)

    return {
        "qweight": interleaved(codes.T),
        "qzeros": interleaved(zeros.T),
        "scales": scales.T.contiguous(),
    }, numbers
