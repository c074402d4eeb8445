"""Shared fixtures; GPU tests skip themselves, with a count, where there is no CUDA device."""

import os

import pytest
import torch

from aqlm_infer.backends import native

if not torch.cuda.is_available():
    # Triton decides when it is first imported (torch's inductor does so too), not at a launch.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def threads():
    """Set torch's thread count; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def isa():
    """Force a CPU kernel path by name; the automatic choice is restored afterwards."""
    yield native.cpu.set_isa
    native.cpu.set_isa("auto")


@pytest.fixture(scope="module")
def one_thread():
    """For tiny tensors, which lose more to waiting threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
