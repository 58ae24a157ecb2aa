"""A server for all tests of a module; helpers are in serving.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from serving import started


@pytest.fixture(scope="module")
def serve():
    with started() as running:
        yield running
