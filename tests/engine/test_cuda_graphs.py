"""CUDA graphs of decode steps, and the engine on them.

Without a GPU the recorded step is called instead of replayed, in Triton's interpreter. Batch sizes, index
buffers, padding rows and how the kernels read them are then the same.
"""

import pytest
import torch

from nanohybrid.config import HybridConfig
from nanohybrid.engine import Engine, SamplingParams, StructuredOutputs
from nanohybrid.engine.random_weights import random_model
from nanohybrid.engine.runner import Runner
from nanohybrid.executors import TorchExecutor
from nanohybrid.executors.cuda_graphs import GraphExecutor, called, cuda_graph, sizes
from nanohybrid.model import HybridCache, Layout

CUDA = torch.cuda.is_available()
CAPTURE = cuda_graph if CUDA else called


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", "triton")


@pytest.fixture(scope="module")
def small():
    """A model with one small layer of each kind, since the interpreter is slow."""
    config = HybridConfig(
        pattern="M*-",
        vocab_size=269,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        mamba_num_heads=2,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=16,
        initializer_range=0.5,
    )
    return random_model(config, torch.float32, seed=3, device="cuda" if CUDA else "cpu")


def pools(model, slots: int, pages: int) -> HybridCache:
    """A cache with random values everywhere, like that of an engine that has been used."""
    state = HybridCache.allocate(model.config, slots, pages, 16, model.dtype, model.device)
    for pool in (*state.slot_pools, *state.page_pools):
        pool.normal_()
    return state


def copied(state: HybridCache, model) -> HybridCache:
    other = HybridCache.allocate(
        model.config, state.slots, state.pages, state.page_size, model.dtype, model.device
    )
    pairs = zip((*other.slot_pools, *other.page_pools), (*state.slot_pools, *state.page_pools), strict=True)
    for to, pool in pairs:
        to.copy_(pool)
    return other


def test_graph_sizes_are_powers_of_two_up_to_the_largest():
    assert [sizes(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


@pytest.mark.parametrize("rows", [1, 3])
def test_graph_step_equals_the_eager_step_and_touches_no_other_sequence(small, rows):
    state = pools(small, slots=5, pages=9)
    reference = copied(state, small)
    with torch.inference_mode():
        graphs = GraphExecutor(TorchExecutor(small, state), most_rows=4, context=64, capture=CAPTURE)
        slots, pages, positions = [2, 0, 3][:rows], [[5, 1], [7], [3, 0, 2]][:rows], [20, 0, 46][:rows]
        for step in range(2):
            layout = Layout.with_cache(
                [1] * rows, [position + step for position in positions], slots, pages, 16
            )
            tokens = [11, 12, 13][:rows]
            found = graphs.logits(tokens, layout)
            expected = small.head(small.hidden(torch.tensor(tokens, device=small.device), layout, reference))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    # All but the spare slot and the spare page.
    for pool, other in zip(state.slot_pools, reference.slot_pools, strict=True):
        torch.testing.assert_close(pool[:4], other[:4])
    for pool, other in zip(state.page_pools, reference.page_pools, strict=True):
        torch.testing.assert_close(pool[:8], other[:8])


def test_graph_self_test_detects_a_graph_with_stale_indices(small):
    state = pools(small, slots=3, pages=5)
    GraphExecutor(TorchExecutor(small, state), most_rows=2, context=32, capture=CAPTURE).self_test()

    def deaf(step):
        hidden, logits = step()
        out = hidden.clone(), logits.clone()
        return lambda: out

    with pytest.raises(RuntimeError, match="differs from the eager step"):
        GraphExecutor(TorchExecutor(small, state), most_rows=2, context=32, capture=deaf).self_test()


def test_engine_with_graphs_equals_one_without(small, tokenizer, monkeypatch):
    prompts = [[1, 5, 9], [1], list(range(20, 40))]
    params = [
        SamplingParams(max_tokens=n, temperature=t, seed=4, ignore_eos=True)
        for n, t in ((4, 0.0), (2, 0.9), (3, 0.0))
    ]

    def texts(capture, prefetch_enabled: bool = True) -> list[list[int]]:
        engine = Engine(small, tokenizer, max_num_seqs=2, max_model_len=64)
        engine.runner = Runner(small, slots=2, pages=2, page_size=128, context=64, capture=capture)
        if engine.runner.decoder is not None:
            engine.runner.decoder.prefetch_enabled = prefetch_enabled
        return [completion.token_ids for completion in engine.generate(prompts, params)]

    found = texts(CAPTURE)
    monkeypatch.setenv("NANOHYBRID_KERNELS", "torch")
    assert found == texts(None)


def test_async_decode_serves_penalties_grammars_forced_tokens_and_cancellation(small, tokenizer, monkeypatch):
    """Requests end, are cancelled and join while the next step has already begun."""

    pytest.importorskip("llguidance")
    letters = StructuredOutputs(regex="[ab]{6}")

    def run(capture) -> list[list[int]]:
        engine = Engine(small, tokenizer, max_num_seqs=3, max_model_len=64)
        engine.runner = Runner(small, slots=3, pages=3, page_size=128, context=64, capture=capture)
        if engine.runner.decoder is not None:
            engine.runner.decoder.prefetch_enabled = True
        some = [
            engine.add(
                [1, 5],
                SamplingParams(
                    max_tokens=5, temperature=1.0, seed=1, repetition_penalty=1.3, ignore_eos=True
                ),
            ),
            engine.add([1, 6, 7], SamplingParams(max_tokens=3, structured_outputs=letters)),
            engine.add([1, 8], SamplingParams(max_tokens=9, ignore_eos=True)),
        ]
        some[0].forced.extend([40, 41])
        for step in range(7):
            if step == 3:
                engine.cancel(some[2])
                some.append(
                    engine.add(
                        [9, 9, 9],
                        SamplingParams(max_tokens=3, temperature=0.7, top_p=0.8, seed=2, ignore_eos=True),
                    )
                )
            engine.step()
            early.append(engine.runner.decoder is not None and engine.runner.decoder._prefetched is not None)
        assert not engine.busy
        return [request.tokens for request in some]

    early: list[bool] = []
    found = run(CAPTURE)
    assert sum(early) >= 3 and set(found[1]) <= set(tokenizer.encode("ab"))
    monkeypatch.setenv("NANOHYBRID_KERNELS", "torch")
    assert found == run(None)


@pytest.mark.gpu
def test_graph_replay_neither_allocates_nor_synchronizes(small):
    graphs = GraphExecutor(
        TorchExecutor(small, pools(small, slots=9, pages=20)), most_rows=8, context=64, capture=cuda_graph
    )
    layout = Layout.with_cache([1] * 5, [3] * 5, range(5), [[i] for i in range(5)], 16)
    graphs.logits([1] * 5, layout)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphs.logits([2] * 5, layout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_self_test_passes_on_a_larger_model(dtype):
    config = HybridConfig(
        pattern="M-M*-M-",
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=10,
        num_key_value_heads=2,
        head_dim=128,
        mamba_num_heads=16,
        mamba_head_dim=80,
        n_groups=2,
        ssm_state_size=128,
    )
    model = random_model(config, dtype, seed=1, device="cuda")
    state = HybridCache.allocate(config, 65, 129, 128, dtype, "cuda")
    GraphExecutor(TorchExecutor(model, state), most_rows=64, context=4096, capture=cuda_graph).self_test()
