"""Every op against the float64 oracle on random shapes: on the CPU, in triton's interpreter, on the GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flux_attention.kernels import api
from tests.kernels import fuzz

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("op", fuzz.OPS)
def test_cpu(op: str) -> None:
    bad = [c for c in fuzz.fuzz(op, n_shapes=40, seed=0) if not c.ok]
    assert not bad, bad[:3]


def test_cpu_bfloat16() -> None:
    for op in fuzz.OPS:
        bad = [c for c in fuzz.fuzz(op, n_shapes=8, seed=2, dtypes=(torch.bfloat16,), max_len=300) if not c.ok]
        assert not bad, bad[:3]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("op", "n_shapes", "max_len"), [("paged_decode", 40, 1200), ("select_blocks", 8, 400)])
def test_triton_interpreter(op: str, n_shapes: int, max_len: int) -> None:
    # A process of its own: triton reads the switch when it is first imported.
    code = f"""
import json, warnings, torch
from tests.kernels import fuzz, interpreter
warnings.simplefilter("ignore")
interpreter.repair()
cases = fuzz.fuzz({op!r}, n_shapes={n_shapes}, seed=3, impl="triton", max_len={max_len}, head_dims=(64, 128),
                  dtypes=(torch.float32, torch.float16))
print(json.dumps([str(c) for c in cases if not c.ok]))
"""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "impl"),
    [
        ("dense", "sdpa"),
        ("dense", "flash4"),
        ("streaming", "sdpa"),
        ("streaming", "flash4"),
        ("triangle", "flash4"),
        ("block_sparse", "sdpa"),
        ("block_sparse", "flash4"),
        ("select_blocks", "torch"),
        ("select_blocks", "triton"),
        ("paged_decode", "sdpa"),
        ("paged_decode", "triton"),
    ],
)
def test_gpu(op: str, impl: str) -> None:
    reason = api.why_unusable(f"{op}_attention", impl, torch.empty(1, 1, 64, dtype=torch.bfloat16, device="cuda"))
    if reason is not None:
        pytest.skip(reason)
    # A few shapes of what is compiled in seconds a kind; `benchmarks/kernels.py` takes 500 of every kind.
    kinds = {"flash4": fuzz.GPU_KINDS[2:4], "triton": fuzz.GPU_KINDS[1:4:2]}.get(impl, fuzz.GPU_KINDS[:4])
    cases = fuzz.fuzz(op, n_shapes=20, seed=4, device="cuda", impl=impl, kinds=kinds)
    bad = [c for c in cases if not c.ok]
    assert not bad, bad[:3]


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["dense", "streaming"])
def test_gpu_gradients(op: str) -> None:
    from flux_attention.kernels.api import Packing

    packing = Packing((700, 129), (700, 129))
    tensors = [torch.randn(829, h, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (8, 2, 2)]
    kwargs = {"scale": 128**-0.5} | ({} if op == "dense" else {"sink": 128, "window": 256, "block": 128})
    run = api.dense_attention if op == "dense" else api.streaming_attention
    wide = [t.detach().double().requires_grad_() for t in tensors]
    out = run(*wide, packing, impl="reference", **kwargs)
    grad = torch.randn_like(out)
    exact = torch.autograd.grad(out, wide, grad)
    half = grad.bfloat16()
    eager = torch.autograd.grad(run(*tensors, packing, impl="reference", **kwargs), tensors, half)
    ours = torch.autograd.grad(run(*tensors, packing, **kwargs), tensors, half)
    for a, e, x in zip(ours, eager, exact, strict=True):
        assert fuzz.relative(a, x) <= fuzz.error_limit(fuzz.relative(e, x), torch.bfloat16)


@pytest.mark.gpu
def test_gpu_decode_graph_and_tuning() -> None:
    from flux_attention.kernels import paged_decode

    lens = [4000, 130, 0, 1]
    q, k_pages, v_pages, table, lengths = fuzz.paged_input(lens, 8, 2, 128, 128, torch.bfloat16, "cuda")
    paged_decode.tune(q, k_pages, v_pages, table, lengths, scale=0.1)
    out = torch.empty_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        api.paged_decode(q, k_pages, v_pages, table, lengths, scale=0.1, impl="triton", out=out)
    # Lengths are read on the device: the same graph serves shorter rows.
    lengths.copy_(torch.tensor([300, 130, 5, 0], dtype=torch.int32))
    table[2, 0] = table[0, 0]
    graph.replay()
    exact = api.paged_decode(
        q.double(), k_pages.double(), v_pages.double(), table, lengths, scale=0.1, impl="reference"
    )
    eager = api.paged_decode(q, k_pages, v_pages, table, lengths, scale=0.1, impl="reference")
    limit = fuzz.error_limit(fuzz.relative(eager, exact), torch.bfloat16)
    assert fuzz.relative(out, exact) <= limit
