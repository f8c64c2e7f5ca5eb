"""A model whose heads are split over two ranks by transformers' `tp_plan`: routes and tokens of the whole model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.test_ranks import ROOT, environment
from tests.models.tp_ranks import MODELS, make_folder, outcomes

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch_split(folder: Path, dtype: str = "float32", timeout: int = 240, **variables: str) -> list[dict]:
    """What two ranks found."""
    command = [*LAUNCHER, str(ROOT / "tests" / "models" / "tp_ranks.py"), str(folder), dtype]
    variables = {**environment(), **variables}
    process = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        told = process.communicate(timeout=timeout)[1]
    finally:
        # The launcher passes this on to the ranks; a kill would leave them behind.
        process.terminate()
    assert process.returncode == 0, told[-4000:]
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(2)]


def assert_same(found: dict, expected: dict, tolerance: float, drawn: bool = False) -> None:
    """Equal routes and tokens; scores and logits to `tolerance`, or bit for bit at 0. `drawn`: sampled tokens, too."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("_sampled"):
            assert not drawn or found[name] == value, name
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
        elif isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


def assert_mixed(found: dict) -> None:
    """Guards the comparisons: a router of one mind would make them weak."""
    for router in ("probe", "inline"):
        route = found[f"{router}_routed_route"].float()
        # The last prompt is too short to be routed.
        assert 0 < route[:, :3].mean() < 1 and route[:, :3].unique(dim=1).shape[1] > 1


@pytest.mark.parametrize("family", MODELS)
def test_ranks_do_what_the_whole_model_does(tmp_path, family):
    make_folder(tmp_path, family)
    whole = outcomes(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval(), tmp_path)
    assert_mixed(whole)
    # No CUDA: the ranks are processors, whatever the machine has.
    first, second = launch_split(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert_same(second, first, 0.0, drawn=True)
    assert_same(first, whole, 1e-3)
