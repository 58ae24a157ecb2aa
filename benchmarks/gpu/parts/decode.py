"""The 9B's decode step at each batch size: launched kernel by kernel, and replayed as a CUDA graph.

The roofline is bytes over bandwidth: all weights but the embedding table, keys and values of the context,
each state read and written. Model, cache and step are those of nanohybrid/evaluate/throughput.py: random
numbers, the engine's forward.
"""

from collections.abc import Callable

import torch
from bench import Bench, milliseconds

from nanohybrid.engine.random_weights import random_model
from nanohybrid.estimate import Footprint
from nanohybrid.evaluate.throughput import DecodeStep
from nanohybrid.executors.cuda_graphs import cuda_graph
from nanohybrid.presets import preset

TITLE = "Milliseconds of a decode step and tokens per second, with logits, without sampling."
BATCHES, CONTEXT = (1, 2, 4, 8, 16, 32, 64), 8192


def run(bench: Bench, emit: Callable[[dict], None]) -> None:
    config = preset("tiny" if bench.toy else "nano-9b-v2")
    dtype = torch.float32 if bench.toy else torch.bfloat16
    model = random_model(config, dtype, device=str(bench.device))
    footprint = Footprint.of(config, dtype)
    context = 40 if bench.toy else CONTEXT
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * dtype.itemsize
    per_sequence = 2 * footprint.state_bytes_per_sequence + context * footprint.kv_bytes_per_token
    for batch in BATCHES[:2] if bench.toy else BATCHES:
        roofline, _ = bench.roofline(footprint.weight_bytes - table + batch * per_sequence)
        step = DecodeStep(model, context, batch)
        forms: dict[str, Callable[[], object]] = {"launched": step}
        if bench.device.type == "cuda":
            forms["graph"] = recorded(step)
        for form, call in forms.items():
            median, minimum, maximum = milliseconds([call], bench.device)
            row = {"batch": batch, "context": context, "form": form, "ms": median}
            row |= {"min_ms": minimum, "max_ms": maximum, "roofline_ms": roofline}
            emit(row | {"fraction": roofline / median, "tokens/s": 1e3 * batch / median})
        del step, forms


def recorded(step: DecodeStep) -> Callable[[], object]:
    """The step as a CUDA graph, recorded as the engine records its steps."""

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        return step.executor.run(step.tokens, step.layout, step.rows)[1]

    with torch.inference_mode():
        return cuda_graph(forward)
