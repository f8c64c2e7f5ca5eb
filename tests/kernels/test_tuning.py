"""What the decode kernel's configuration is judged on, with times that are made up."""

import sys
import types

import pytest
import torch

from flux_attention.kernels import paged_decode
from flux_attention.kernels.paged_decode import DecodeConfig

LONG, SHORT = DecodeConfig(4096, 128, 4, 2), DecodeConfig(1024, 64, 4, 3)
TOO_LARGE = DecodeConfig(8192, 256, 4, 3)


@pytest.fixture
def judged(monkeypatch):
    """Lengths that candidates were timed on. Long stretches are a little better for equal rows, bad for mixed ones."""
    errors = types.ModuleType("triton.runtime.errors")
    errors.OutOfResources = MemoryError
    for name in ("triton", "triton.runtime"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "triton.runtime.errors", errors)
    monkeypatch.setattr(paged_decode, "_TUNED", {})
    seen: list[list[int]] = []

    def decode(q, k, v, table, lengths, *, config, **_):
        if config == TOO_LARGE:
            raise MemoryError
        return lengths, config

    def elapsed(run, device, repeats):
        lengths, config = run()
        seen.append(lengths.tolist())
        mixed = len(set(lengths.tolist())) > 1
        return {(LONG, False): 1.0, (SHORT, False): 1.02, (LONG, True): 0.65, (SHORT, True): 0.56}[config, mixed]

    monkeypatch.setattr(paged_decode, "paged_decode_triton", decode)
    monkeypatch.setattr(paged_decode, "_elapsed", elapsed)
    return seen


def tune(rows, configs=(TOO_LARGE, LONG, SHORT)):
    q, pages = torch.zeros(rows, 4, 16), torch.zeros(rows * 64, 16, 2, 16)
    table = torch.arange(rows * 64, dtype=torch.int32).view(rows, 64)
    lengths = torch.full((rows,), 1000, dtype=torch.int32)
    found = paged_decode.tune(q, pages, pages, table, lengths, scale=1.0, configs=configs)
    assert lengths.tolist() == [1000] * rows
    # What was found serves the next request of about this size, whatever its routes.
    assert paged_decode.tune(q, pages, pages, table, lengths, scale=1.0) == found
    return found


def test_several_rows_are_judged_mixed_as_well(judged):
    assert tune(4) == SHORT
    assert judged == [[1000] * 4, [1000, 64, 1000, 64]] * 2


def test_one_row_is_judged_alone(judged):
    assert tune(1) == LONG
    assert judged == [[1000]] * 2


def test_no_configuration_fits(judged):
    with pytest.raises(RuntimeError, match="no launch configuration"):
        tune(2, configs=(TOO_LARGE,))
