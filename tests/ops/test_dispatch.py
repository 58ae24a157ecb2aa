"""Which form of an op runs."""

import pytest
import torch

from nanohybrid.ops.gated_norm import gated_norm
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan import chunked, reference, ssd_scan


def call():
    return gated_norm(torch.randn(2, 4), torch.randn(2, 4), torch.ones(4), 2, 1e-5)


def test_an_unknown_form_is_an_error(monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"NANOHYBRID_KERNELS is 'fast': known are reference, torch"):
        call()


@pytest.mark.parametrize("form, module", [("reference", reference), ("torch", chunked), ("", chunked)])
def test_a_form_can_be_forced(form, module, monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", form)
    monkeypatch.setattr(module, "ssd_scan", lambda *arguments: "chosen")
    assert ssd_scan(torch.zeros(1, 1, 1), *[None] * 5, Layout.packed([1])) == "chosen"
