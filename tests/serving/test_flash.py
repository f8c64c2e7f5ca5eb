"""The GPU's backend where there is no GPU (`flash_on_cpu`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.harness import TOLERANCE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]


def test_the_gpu_backend_plans_what_its_kernels_need():
    paths = os.pathsep.join((*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT / "src"), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.flash_on_cpu"],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["difference"] < TOLERANCE
    # A table for every bundle in every step of decode, and every block back.
    assert found["decode"] > 2 * 2 * 30 and found["lost"] == 0
