"""The scan's Triton kernels against the recurrence in float64: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from scan_inputs import scan_of
from torch import Tensor

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan import reference
from nanohybrid.ops.ssd_scan import torch as torch_form
from nanohybrid.ops.ssd_scan import triton as triton_form

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
RAGGED = {
    "short documents": Layout.packed([1, 2, 17]),
    "over two borders": Layout.packed([63, 300]),
    "continuations": Layout.with_cache(
        [5, 130, 3, 1], [125, 200, 2, 0], [3, 0, 2, 1], [range(5), range(5, 20), [20], [21]], 32
    ),
}


def inputs(layout: Layout, H: int, P: int, G: int, N: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """As the mixer gives them: x, B and C are slices of one matrix; sequences that begin here have a state of
    zeros.
    """
    T = layout.tokens
    x, B, C = torch.randn(T, H * P + 2 * G * N).to(dtype).split([H * P, G * N, G * N], dim=-1)
    initial = None
    if layout.continues:
        initial = torch.randn(layout.sequences, H, P, N) * torch.tensor(layout.positions).bool().view(
            -1, 1, 1, 1
        )
    return {
        "x_THP": x.unflatten(-1, (H, P)),
        "dt_TH": torch.rand(T, H) * 0.5,
        "A_H": -torch.rand(H) * 2,
        "B_TGN": B.unflatten(-1, (G, N)),
        "C_TGN": C.unflatten(-1, (G, N)),
        "D_H": torch.randn(H),
        "initial_SHPN": initial,
    }


def check(
    layout: Layout,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    chip: torch.device,
    close,
    expected_form=reference,
) -> None:
    tensors = inputs(layout, *shape, dtype)
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    y, final = scan_of(expected_form, layout)(**wide)
    on_chip = {name: None if t is None else t.to(chip) for name, t in tensors.items()}
    found, found_final = scan_of(triton_form, layout)(**on_chip)
    assert found.dtype == found_final.dtype == torch.float32
    close(found, y, TOLERANCE[dtype])
    close(found_final, final, TOLERANCE[dtype])


@pytest.mark.parametrize("name", RAGGED)
def test_triton_ssd_scan_equals_the_recurrence(name, chip, close):
    check(RAGGED[name], (2, 12, 1, 6), torch.float32, chip, close)


@pytest.mark.parametrize("shape", [(4, 20, 2, 17), (2, 80, 2, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_triton_ssd_scan_with_a_split_head_dimension_and_tiles_over_two_heads(shape, dtype, chip, close):
    check(Layout.with_cache([70, 9], [100, 0], [0, 1], [[0, 1], [2]], 128), shape, dtype, chip, close)


def test_triton_ssd_scan_has_the_same_bits_when_cut_at_a_chunk_border(chip):
    shape, layout = (2, 16, 1, 16), Layout.packed([200])
    tensors = {name: t.to(chip) for name, t in inputs(layout, *shape, torch.float32).items() if t is not None}
    whole, final = scan_of(triton_form, layout)(**tensors)
    parts, state = [], None
    for begin, end in ((0, 128), (128, 200)):
        part = Layout.with_cache([end - begin], [begin], [0], [range(2)], 128)
        cut = {name: t[begin:end] if "_T" in name else t for name, t in tensors.items()}
        y, state = scan_of(triton_form, part)(**cut, initial_SHPN=state)
        parts.append(y)
    assert torch.equal(torch.cat(parts), whole) and torch.equal(state, final)


def test_triton_ssd_scan_resets_state_at_document_boundaries(chip):
    layout = Layout.packed([20, 5])
    tensors = {
        name: t.to(chip) for name, t in inputs(layout, 2, 16, 1, 16, torch.float32).items() if t is not None
    }
    clean, state = scan_of(triton_form, layout)(**tensors)
    dirty = {name: t.clone() for name, t in tensors.items()}
    for name in ("x_THP", "B_TGN", "C_TGN"):
        dirty[name][:20] = float("nan")
    found, after = scan_of(triton_form, layout)(**dirty)
    assert torch.equal(found[20:], clean[20:]) and torch.equal(after[1], state[1])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(128, 80, 8, 128), (32, 64, 8, 128), (16, 64, 1, 256), (6, 96, 3, 64), (5, 120, 1, 16)], ids=str
)
@pytest.mark.parametrize("lengths", [[1], [127, 128, 129], [2048], [3, 700, 16, 1, 1000]], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_triton_ssd_scan_on_a_gpu(lengths, shape, dtype, chip, close):
    S = len(lengths)
    pages = [range(20 * i, 20 * i + 20) for i in range(S)]
    continuing = Layout.with_cache(lengths, [(77 * i) % 300 for i in range(S)], range(S), pages, 128)
    check(
        continuing, shape, dtype, chip, close, expected_form=torch_form
    )  # in float64; itself tested against the recurrence
