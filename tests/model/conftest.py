"""Fixtures over the table of tiny models (tests/configurations.py)."""

import pytest
import torch
from configurations import BASE, CONFIGS
from torch import Tensor

from nanohybrid.config import HybridConfig
from nanohybrid.model import HybridLM


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> HybridConfig:
    return HybridConfig(**(BASE | request.param))


@pytest.fixture
def mixed() -> HybridConfig:
    return HybridConfig(**(BASE | CONFIGS["mixed"]))


@pytest.fixture
def model(config: HybridConfig) -> HybridLM:
    """In float64, so that what remains of a difference is a mistake."""
    return HybridLM(config, seed=0).double()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(50, (300,), generator=torch.Generator().manual_seed(1))
