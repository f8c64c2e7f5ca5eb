"""Launches of flash-attn-4 that are held back, on a stand-in for its interface."""

import sys
import threading
from types import ModuleType

import pytest
import torch

from flux_attention.kernels import api, held
from flux_attention.kernels.packing import Packing


@pytest.fixture
def launched(monkeypatch):
    """Stands in for flash-attn-4: compiles a "kernel" per key at its first call, and looks it up at each."""
    launched = []

    def forward(key, out):
        if key not in forward.compile_cache:
            forward.compile_cache[key] = lambda x: launched.append((key, x.fill_(key)))
        forward.compile_cache[key](out)
        return out

    forward.compile_cache = {}
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["flash_attn.cute.interface"]._flash_attn_fwd = forward
    launched.append(forward)
    return launched


def test_launches_wait_for_the_call(launched):
    forward = launched.pop()
    out = torch.zeros(2)

    def run():
        forward(1, out[:1])
        forward(2, out[1:])
        return out

    first, second = held.hold(run), held.hold(lambda: forward(3, torch.zeros(1)))
    assert not launched and out.tolist() == [0, 0]
    assert first() is out and out.tolist() == [1, 2]
    # What is not held is launched at once, and a side that is not taken never.
    forward(4, torch.zeros(1))
    assert [key for key, _ in launched] == [1, 2, 4]
    assert second().tolist() == [3]


def test_a_kernel_of_our_own_is_held_as_well(launched):
    out = torch.zeros(2)

    def run():
        held.launch(out.fill_, 3)
        return out

    make = held.hold(run)
    assert out.tolist() == [0, 0] and make() is out and out.tolist() == [3, 3]
    held.launch(out.fill_, 4)
    assert out.tolist() == [4, 4]


def test_only_the_thread_that_holds(launched):
    forward = launched.pop()

    def run():
        other = threading.Thread(target=forward, args=(7, torch.zeros(1)))
        other.start()
        other.join()
        return forward(8, torch.zeros(1))

    launch = held.hold(run)
    assert [key for key, _ in launched] == [7]
    launch()
    assert [key for key, _ in launched] == [7, 8]


def test_an_error_lets_go(launched):
    forward = launched.pop()
    with pytest.raises(ZeroDivisionError):
        held.hold(lambda: 1 / 0)
    forward(1, torch.zeros(1))
    assert len(launched) == 1


def test_what_is_prepared(launched, monkeypatch):
    """Only where nothing reads the result behind the launch: no gradients, and streaming over tiles."""
    forward = launched.pop()
    q, packing = torch.zeros(256, 1, 64), Packing((256,), (256,))

    def run():
        return forward(1, torch.zeros(1))

    def prepared(op, q=q, packing=packing, block=None):
        launched.clear()
        launch = api.prepare(op, run, q, q, q, packing, block=block)
        return launch is not run

    assert not prepared("dense_attention") and not prepared("streaming_attention", block=128)
    monkeypatch.setattr(api, "resolve", lambda *_: "flash4")
    assert prepared("dense_attention") and prepared("streaming_attention", block=128)
    assert not launched
    assert not prepared("streaming_attention", block=192)
    assert not prepared("streaming_attention", packing=Packing((250,), (256,)), block=128)
    assert not prepared("dense_attention", q.clone().requires_grad_())
    assert not prepared("streaming_attention", q.clone().requires_grad_(), block=128)
