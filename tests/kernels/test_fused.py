"""The fused ops: the eager versions against transformers' modules, triton's against float64."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from flux_attention.kernels import fused
from flux_attention.kernels.api import UnsupportedKernelError
from tests.kernels.fused_cases import cases

ROOT = Path(__file__).resolve().parents[2]


@torch.no_grad()
def test_definitions_are_transformers():
    torch.manual_seed(0)
    module = Qwen3RMSNorm(16)
    module.weight.normal_()
    norm = fused.Norm(module.weight, module.variance_epsilon)
    x = torch.randn(7, 16)
    assert torch.equal(fused.rms_norm(x, norm), module(x))
    normed, total = fused.add_rms_norm(x, x.flip(0), norm)
    assert torch.equal(total, x + x.flip(0)) and torch.equal(normed, module(total))
    q, k, angle = torch.randn(7, 4, 16), torch.randn(7, 2, 16), torch.rand(7, 8).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    ours = fused.rotary(q.flatten(1), k.flatten(1), cos, sin, 16, norm, norm)
    theirs = apply_rotary_pos_emb(*(module(t).transpose(0, 1)[None] for t in (q, k)), cos[None], sin[None])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


def test_bad_implementation_is_refused():
    x = torch.randn(2, 16)
    norm = fused.Norm(torch.ones(16), 1e-6)
    with pytest.raises(ValueError, match="got 'cuda'"):
        fused.rms_norm(x, norm, impl="cuda")
    with pytest.raises(UnsupportedKernelError, match="impl='torch' runs"):
        fused.rms_norm(x, norm, impl="triton")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_interpreter():
    code = """
import json, warnings, torch
from tests.kernels import fused_cases, interpreter
warnings.simplefilter("ignore")
interpreter.repair()
cases = list(fused_cases.cases("triton", "cpu", (torch.float32, torch.float16)))
print(json.dumps([len(cases), [str(c) for c in cases if not c.ok]]))
"""
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    count, bad = json.loads(done.stdout)
    assert count > 50 and not bad, bad[:3]


# One test a kind: most of the time goes into compiling, a core each.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(9, 3, 64, 576, 1536), (32, 8, 128, 4096, 12288), (7, 1, 32, 130, 65)])
@torch.no_grad()
def test_gpu(shape: tuple[int, ...], dtype: torch.dtype):
    found = list(cases("triton", "cuda", (dtype,), (shape,)))
    bad = [c for c in found if not c.ok]
    assert len(found) > 20 and not bad, bad[:3]
