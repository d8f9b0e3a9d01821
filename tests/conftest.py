"""Fixtures shared by the tests."""

import pytest

from pipelines import data


@pytest.fixture(scope="session")
def mnist_root():
    """The data folder, with MNIST in it; fails with the data error (it does not skip) where no source can be reached."""
    data.fetch_mnist(data.EMBEDDED.parent)
    return data.EMBEDDED.parent
