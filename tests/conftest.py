"""Fixtures shared by the tests."""

import pytest

from eplib.data import DATA
from pipelines import data


@pytest.fixture(scope="session")
def mnist_root():
    """The data folder with MNIST in it; where no source is reached, fails with the data error (it does not skip)."""
    with data.only_one(DATA):
        data.fetch_mnist(DATA)
    return DATA


@pytest.fixture(scope="session")
def compiled_kernel():
    """The compiled kernel, built if it is not. Where there is a compiler and the build fails, the tests that need it fail; only
    without a compiler are they skipped."""
    from eplib import kernels  # here, because not every test needs torch

    if not kernels.available() and kernels.compiler() is None:
        pytest.skip("the compiled kernel is not built, and there is no C++ compiler (c++, g++ or clang++; CXX names another)")
    kernels.build()
