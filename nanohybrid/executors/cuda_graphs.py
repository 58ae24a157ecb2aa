"""The CUDA-graph executor: decode steps of the torch executor, recorded once and replayed with one launch for
the whole model.

A graph reads fixed memory. So everything that changes from step to step (ids, slots, positions, pages) lies
in static index buffers that one copy fills, and a layout whose tables are those buffers stands for every
batch. Batches are padded to the next of a few sizes; padding rows work on a slot and a page that no sequence
owns, at position 0.

The ops must read the layout on the device, never on the host: the Triton forms do, the torch forms do not.

B rows of a graph · W pages a sequence may have · E hidden size · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from nanohybrid.executors.executor import Executor
from nanohybrid.executors.torch import TorchExecutor
from nanohybrid.model.lm import HybridLM
from nanohybrid.ops.dispatch import runs_triton
from nanohybrid.ops.layout import Layout

Outputs = tuple[Tensor, Tensor]  # hidden states [B, E] and logits [B, V]
Step = Callable[[], Outputs]
Capture = Callable[[Step], Step]
TOLERANCE = 0.02
"""Of the self-test, relative: an eager step of fewer rows may sum its products in another order."""


class GraphExecutor(Executor):
    """Replays the decode steps of a torch executor; everything else runs on that executor.

    The last slot and the last page of the cache belong to the graphs. `capture` turns a step into one that
    does the same to the same memory and returns the same tensors: `cuda_graph`, or `called` to test
    everything else without a GPU.
    """

    name = "cuda_graphs"

    def __init__(self, eager: TorchExecutor, *, most_rows: int, context: int, capture: Capture) -> None:
        super().__init__(eager.model, eager.cache)
        self.eager, self.most_rows = eager, most_rows
        width = -(-context // self.cache.page_size)
        self._buckets: dict[int, _Bucket] = {}
        with torch.inference_mode():
            for rows in reversed(
                sizes(most_rows)
            ):  # the largest first: the others fit into the memory it leaves
                self._buckets[rows] = _Bucket(eager, rows, width, capture)

    def run(self, tokens_T: Tensor, layout: Layout, wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As Executor.run; a decode step that fits a graph is replayed."""
        if not layout.is_decode or layout.speculative or layout.sequences > self.most_rows:
            return self.eager.run(tokens_T, layout, wanted)
        hidden_SE, logits_SV = self._replay(tokens_T, layout)
        rows = torch.tensor(list(wanted), dtype=torch.int64, device=logits_SV.device)
        return hidden_SE.clone(), logits_SV[rows] if wanted else torch.empty(0)

    def logits(self, tokens: list[int] | Tensor, layout: Layout) -> Tensor:
        """Logits [S, V] in fp32 of one token for each sequence of a decode layout; updates the cache.

        tokens: ids, or int64 [S] on the device. The logits lie in memory that the next step overwrites.
        """
        return self._replay(tokens, layout)[1]

    def _replay(self, tokens: list[int] | Tensor, layout: Layout) -> Outputs:
        rows = min(size for size in self._buckets if size >= len(tokens))
        return self._buckets[rows].run(tokens, layout)

    @torch.inference_mode()
    def self_test(self) -> None:
        """Compare two steps of every graph with eager ones, on slots and pages that nothing uses yet.

        Raises RuntimeError where logits differ by more than rounding.
        """
        before = 0
        for rows in sorted(self._buckets):
            filled = min(
                (before + rows + 1) // 2, self.cache.slots - 1, self.cache.pages - 1
            )  # not all rows, where there is a choice
            before = rows
            slots, pages = range(filled), [[page] for page in range(filled)]
            for position in (0, 1):
                layout = Layout.with_cache(
                    [1] * filled, [position] * filled, slots, pages, self.cache.page_size
                )
                tokens = [(7 * row + position) % self.model.config.vocab_size for row in range(filled)]
                saved = [self.cache.save(slot, [slot]) for slot in slots]
                replayed = self.logits(tokens, layout).clone()
                for slot, copy in zip(slots, saved, strict=True):
                    self.cache.load(copy, slot, [slot])
                ids = torch.tensor(tokens, device=replayed.device)
                _, eager = self.eager.run(ids, layout, range(filled))
                error = float((replayed - eager).norm() / eager.norm().clamp(min=1e-30))
                if not error <= TOLERANCE:
                    raise RuntimeError(
                        f"a decode graph of {rows} rows differs from the eager step by {error:.2g} of its logits"
                    )


class _Bucket:
    """One recorded step and its index buffer: ids, slots, positions and rows of the page pool [4, B], then the pages [B, W]."""

    def __init__(self, eager: TorchExecutor, rows: int, width: int, capture: Capture) -> None:
        device, state = eager.model.device, eager.cache
        self._rows, self._page_size = rows, state.page_size
        self._spare = np.zeros((4 + width) * rows, dtype=np.int64)  # what stands where no sequence does
        columns, pages = self._parts(self._spare)
        columns[1], columns[3], pages[:] = (
            state.slots - 1,
            (state.pages - 1) * state.page_size,
            state.pages - 1,
        )
        self._host = torch.from_numpy(self._spare.copy())
        self._host = self._host.pin_memory() if device.type == "cuda" else self._host
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._device = self._host.to(device)
        ids, slots, positions, page_rows = self._device[: 4 * rows].view(4, rows).unbind(0)
        tables = {
            "slots": slots,
            "positions": positions,
            "page_rows": page_rows,
            "page_table": self._device[4 * rows :].view(rows, width),
        }
        any_batch = Layout.with_cache(
            [1] * rows,
            [width * state.page_size - 1] * rows,
            range(rows),
            [range(width)] * rows,
            state.page_size,
        )
        layout = any_batch.on_device(device, tables)
        self._replay = capture(lambda: eager.run(ids, layout, range(rows)))

    def run(self, tokens: list[int] | Tensor, layout: Layout) -> Outputs:
        assert layout.slots is not None and layout.pages is not None
        if self._copied is not None:
            # the last copy has left the pinned buffer: it ran before the last step did
            self._copied.synchronize()
        S, size, flat = len(tokens), self._page_size, self._host.numpy()
        flat[:] = self._spare
        columns, table = self._parts(flat)
        columns[1, :S], columns[2, :S] = layout.slots, layout.positions
        if not isinstance(tokens, Tensor):
            columns[0, :S] = tokens
        for row, (pages, position) in enumerate(zip(layout.pages, layout.positions, strict=True)):
            columns[3, row] = pages[position // size] * size + position % size
            table[row, : len(pages)] = pages
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if isinstance(tokens, Tensor):
            self._device[:S].copy_(tokens)
        hidden_BE, logits_BV = self._replay()
        return hidden_BE[:S], logits_BV[:S]

    def _parts(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return flat[: 4 * self._rows].reshape(4, self._rows), flat[4 * self._rows :].reshape(self._rows, -1)


def graphs_apply(model: HybridLM) -> bool:
    """Whether graphs can run the model: on a GPU, with Triton kernels and layers that read layouts on the device."""
    if not all(mixer.cuda_graphs for mixer in model.config.mixers):
        return False
    return model.device.type == "cuda" and runs_triton() and model.dtype != torch.float64


def sizes(most: int) -> list[int]:
    """The batch sizes that are recorded: powers of two, and the most there can be."""
    return [*takewhile(lambda size: size < most, (1 << n for n in range(most.bit_length() + 1))), most]


def cuda_graph(step: Step) -> Step:
    """Record a step on the current device.

    It is run before, so that every kernel is compiled and every workspace there.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Outputs:
        graph.replay()
        return out

    return replay


def called(step: Step) -> Step:
    """No graph: the step itself, into the same tensors each time."""
    out = step()

    def replay() -> Outputs:
        for mine, new in zip(out, step(), strict=True):
            mine.copy_(new)
        return out

    return replay
