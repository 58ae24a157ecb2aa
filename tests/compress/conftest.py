"""What the tests of compression share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from compress_models import DENSE, make_calibration, make_model


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def dense():
    return make_model("*-*-", **DENSE)


@pytest.fixture
def calibration():
    return make_calibration()
