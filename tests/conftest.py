"""Shared by all tests: one thread a process, and what needs a CUDA device is skipped without one."""

import os
from collections.abc import Iterator

import pytest

# Before torch is imported. Several processes share the cores: more threads than cores slow every one of them down. And
# a sum's last bits depend on the number of threads, so processes that are compared bit for bit take the same.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _give_memory_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several processes share the device: none keeps the gigabytes that an oracle took."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        torch.cuda.empty_cache()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in gpu:
        item.add_marker(skip)
