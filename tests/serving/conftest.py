"""Engines for these tests: real ones, started in this process and ended with the module that asked for them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from flux_attention.serving.compat import UnsupportedVLLMError, check_version
from tests.serving import harness


def _why_not() -> str | None:
    try:
        check_version()
    except UnsupportedVLLMError as error:
        return str(error)
    # Checkouts of vLLM's sources can be found without being installed.
    return None if find_spec("vllm") else "vLLM is not installed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_not()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("vllm") and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"make test-serving runs these: {reason}"))


@pytest.fixture(scope="module")
def start() -> Iterator[Any]:
    """`start(folder, adapter, **engine arguments)`; one engine at a time."""
    with harness.Engines() as engines:
        yield engines.start


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> harness.Reference:
    return harness.smollm2()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> harness.Reference:
    return harness.tiny("llama", tmp_path_factory.mktemp("tiny-llama"))
