"""The profile of a training step: every event is in one part, and every part has a roofline."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def profiles(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import train_profile

    yield train_profile
    sys.modules.pop("train_profile", None)


@pytest.mark.parametrize(
    "names, part",
    [
        (["aten::mm", "_Summed"], "loss and head"),
        (["aten::mm", "aten::linear"], "projections"),
        (["aten::copy_", "aten::_to_copy", "aten::to", "aten::linear"], "casts"),
        (["_ScanBackward", "autograd::engine::evaluate_function: _ScanBackward"], "scan, backward"),
        (["aten::bmm", "Chunk"], "scan, forward"),
        (["aten::_fused_adamw_", "Optimizer.step#AdamW.step"], "optimizer"),
        (["aten::embedding"], "rest"),
    ],
)
def test_group_assigns_an_event_to_the_part_of_its_caller(profiles, names, part):
    assert profiles.group(names) == part


def test_rooflines_cover_every_part_of_a_step(profiles):
    import nanohybrid
    from nanohybrid.model import HybridLM

    model = HybridLM(nanohybrid.preset("tiny"), seed=0)
    rooflines = profiles.rooflines(model, [100, 28], stream=1e9, product=1e9)
    assert set(rooflines) == {*profiles.WHOLE, *profiles.NEAREST, profiles.REST}
    products = rooflines["projections"] + rooflines["loss and head"]
    assert products == pytest.approx(1e3 * profiles.product_flops(model, 128) / 1e9)
