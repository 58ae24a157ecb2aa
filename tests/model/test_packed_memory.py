"""Packing holds one original beside what is packed already, never two copies of a model."""

import weakref

import pytest
import torch

from nanohybrid.config import HybridConfig
from nanohybrid.model import HybridLM, packed
from nanohybrid.ops.cpu import available


@pytest.mark.skipif(not available(), reason="needs numba")
def test_an_original_is_let_go_before_the_next_but_one_is_laid_out(monkeypatch):
    model = HybridLM(HybridConfig.preset("tiny"), seed=0).to(torch.bfloat16).eval()
    originals = [weakref.ref(getattr(*place)) for place in packed._linears(model)]
    alive, original = [], packed.PackedLinear.of

    def counting(linear):
        alive.append(sum(reference() is not None for reference in originals))
        return original(linear)

    monkeypatch.setattr(packed.PackedLinear, "of", counting)
    packed.pack_model(model)
    assert len(originals) > 8 and alive == list(range(len(originals), 0, -1))
