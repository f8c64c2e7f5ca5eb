"""The recipes for 8B models run as they are, on a tiny backbone in the place of theirs."""

import importlib.util
import json
from pathlib import Path

import pytest

from flux_attention.models.adapter import load_adapter
from flux_attention.training.build import build
from flux_attention.training.launch import main
from flux_attention.training.sources import Rows

from .tiny_backbone import make_tokenizer, save_all

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def load(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["qwen3_8b_1gpu", "qwen3_8b_8gpu", "llama31_8b"])
def test_recipes_run(tmp_path, name):
    backbone, _ = save_all(tmp_path)
    text = "Once upon a time there was a code, and the code was 7. " * 42
    made = [{"context": text, "question": f"{i}?", "answer": "7", "task": ("qa", "summary")[i % 2]} for i in range(4)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, made)))
    plan = load(name).PLAN
    build([Rows.parse(str(rows))], make_tokenizer(), tmp_path / "data", pack_tokens=plan.scale.pack_tokens)
    places = {"model": backbone, "data": tmp_path / "data", "out": tmp_path / "adapter", "runs": tmp_path / "runs"}
    options = [part for key, value in places.items() for part in (f"--{key}", str(value))]
    trainer = main(
        plan, [*options, "--steps", "1", "--accumulation", "1", "--sequence-parallel", "1", "--device", "cpu"]
    )
    assert trainer.state.global_step == 1
    assert load_adapter(tmp_path / "adapter").config.window_tokens == plan.flux.window_tokens
    # 13 M tokens or fewer: a router needs no more.
    ranks = 8 // plan.scale.sequence_parallel if "8gpu" in name else 1
    assert plan.scale.steps * plan.scale.accumulation * plan.scale.pack_tokens * ranks <= 20e6
