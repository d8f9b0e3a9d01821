"""Fixtures shared by the tests."""

import pytest

from eplib.data import DATA
from pipelines import data


@pytest.fixture(scope="session")
def mnist_root():
    """The data folder with MNIST in it; where no source is reached, fails with the data error (it does not skip)."""
    data.fetch_mnist(DATA)
    return DATA
