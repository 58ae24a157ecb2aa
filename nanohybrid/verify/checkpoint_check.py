"""Check that a saved checkpoint loads as the same model."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from nanohybrid.checkpoint import load, save
from nanohybrid.estimate import Footprint
from nanohybrid.model import HybridLM
from nanohybrid.model.quantized import format_in
from nanohybrid.model.spec import param_specs
from nanohybrid.verify.model_under_test import ModelUnderTest
from nanohybrid.verify.result import CheckResult
from nanohybrid.verify.small import small_model

WHOLE = 2**30
"""Largest model, in bytes of weights, that is saved itself.

A small copy of the architecture stands for larger ones.
"""


def saved_equals_loaded(subject: ModelUnderTest) -> CheckResult:
    """Save, load, compare: every parameter (of quantized matrices codes and scales) and every logit, bit for bit."""
    model, on = subject.model, "the model"
    dtype = model.dtype
    if Footprint.of(model.config, dtype, format=format_in(model)).weight_bytes > WHOLE:
        model, on = small_model(model.config).to(dtype), "a small copy"
    with tempfile.TemporaryDirectory(prefix="nanohybrid-verify-") as directory:
        save(model, Path(directory) / "checkpoint")
        again = load(Path(directory) / "checkpoint", device=model.device)
        return CheckResult("save -> load -> equal", on, _largest(model, again, dtype), 0.0)


def _largest(model: HybridLM, again: HybridLM, dtype: torch.dtype) -> float:
    """The largest difference of any parameter or logit; infinite if names, shapes or dtypes differ."""
    if param_specs(again.config) != param_specs(model.config) or again.dtype != dtype:
        return float("inf")
    ours, theirs = model.state_dict(), again.state_dict()
    if ours.keys() != theirs.keys():
        return float("inf")
    differences = [_distance(tensor, theirs[name]) for name, tensor in ours.items()]
    first, second = ModelUnderTest(model), ModelUnderTest(again)
    return max(*differences, _distance(first.reference, second.reference))


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference: 0 for equal bits, infinite if dtypes or shapes differ, or for NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return float("inf")
    if torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.dtype.itemsize == 1 else torch.equal(a, b):
        return 0.0
    return (a.detach().double() - b.detach().double()).abs().nan_to_num(nan=float("inf")).max().item()
