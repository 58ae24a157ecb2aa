"""Held-out loss and decode time."""

import numpy as np
import pytest
import torch

from nanohybrid.checkpoint import load
from nanohybrid.data import TokenStore
from nanohybrid.errors import InputError
from nanohybrid.estimate import Footprint
from nanohybrid.evaluate.perplexity import held_out_loss
from nanohybrid.evaluate.throughput import DecodeStep, decode_times
from nanohybrid.executors.cpu.weights import prepare
from nanohybrid.model import HybridLM, Layout
from nanohybrid.presets import preset


def store(seed=0, count=9):
    rng = np.random.default_rng(seed)
    return TokenStore.from_documents(
        (rng.integers(13, 269, n), rng.integers(0, 2, n)) for n in rng.integers(2, 30, count)
    )


@torch.no_grad()
def test_held_out_loss_equals_the_mean_over_targets_of_full_logits(checkpoint):
    model, documents = load(checkpoint, torch.float32), store()
    total, count = 0.0, 0
    for index in range(len(documents)):
        tokens, loss = documents.document(index)
        ids = torch.from_numpy(np.array(tokens)).long()
        logp = model(ids, layout=Layout.packed([len(ids)])).log_softmax(-1)
        for place in range(1, len(ids)):
            if loss[place]:
                total, count = total - logp[place - 1, ids[place]].item(), count + 1
    found = held_out_loss(model, documents, batch_tokens=40)
    assert found.targets == count and found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(found.loss))


def test_held_out_loss_refuses_documents_without_targets(checkpoint):
    nothing = TokenStore.from_documents([([20, 21, 22], [0, 0, 0])])
    with pytest.raises(InputError, match="no target token"):
        held_out_loss(load(checkpoint, torch.float32), nothing)


def test_decode_step_writes_the_caches_at_its_context_only(checkpoint):
    model = load(checkpoint, torch.float32)
    step = DecodeStep(model, context=130, batch=3, seed=1)
    assert step.layout.positions == (130,) * 3 and step.layout.is_decode
    before = [{name: pool.clone() for name, pool in pools.items()} for pools in step.state.layers]
    assert step() > 0
    assert not torch.equal(before[0]["ssm"], step.state.layers[0]["ssm"])
    changed = (before[2]["key"] != step.state.layers[2]["key"]).flatten(2).any(-1)
    assert changed.nonzero().tolist() == [
        [1, 2],
        [3, 2],
        [5, 2],
    ]  # two pages a sequence; position 130 is row 2 of the second


def test_decode_step_runs_the_executor_that_the_engine_chooses():
    model = HybridLM(preset("tiny"), seed=0).bfloat16().eval()
    assert DecodeStep(model, context=8, batch=2).executor.name == "torch"
    assert prepare(model)
    step = DecodeStep(model, context=8, batch=2)
    assert step.executor.name != "torch" and step() > 0


def test_decode_times_of_a_hybrid_and_a_transformer_have_their_cache_bytes(checkpoint, dense_checkpoint):
    models = {"hybrid": load(checkpoint, torch.float32), "dense": load(dense_checkpoint, torch.float32)}
    rows = decode_times(models, (8, 200), batch=2, rounds=3)
    assert [row.context for row in rows["dense"]] == [8, 200] and all(
        0 < r.quickest <= r.milliseconds for f in rows.values() for r in f
    )
    for model in models.values():
        cache_bytes = sum(
            p.nbytes for layer in DecodeStep(model, 127, 1).state.layers for p in layer.values()
        )
        assert cache_bytes == Footprint.of(model.config, torch.float32).sequence_bytes(128)
    assert rows["dense"][1].sequence_bytes - rows["dense"][0].sequence_bytes == 2 * (
        rows["hybrid"][1].sequence_bytes - rows["hybrid"][0].sequence_bytes
    )
