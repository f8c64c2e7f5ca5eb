"""The recipes run as they are, on a tiny backbone in the place of theirs."""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flux_attention.models.adapter import load_adapter
from flux_attention.training.build import build
from flux_attention.training.card import mean_ranking
from flux_attention.training.launch import main
from flux_attention.training.sources import Rows

from .tiny_backbone import LAYERS, make_tokenizer, save_all

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


def test_prompts_read_whole_are_spread_over_tasks():
    spread = load("smollm2").spread_over_tasks
    samples = [SimpleNamespace(task="many" if i % 10 else ("few", "rare")[i % 20 == 0]) for i in range(100)]
    rows = list(range(1, 100))
    found = spread(rows, samples, 9, seed=0)
    assert Counter(samples[i].task for i in found) == {"many": 3, "few": 3, "rare": 3}
    assert len(set(found)) == 9 and set(found) <= set(rows)
    assert spread(rows, samples, 9, seed=0) == found != spread(rows, samples, 9, seed=1)
    # Tasks that run out leave their places to the others; all rows are the most there are.
    assert Counter(samples[i].task for i in spread(rows, samples, 20, seed=0)) == {"many": 11, "few": 5, "rare": 4}
    assert sorted(spread(rows, samples, 1000, seed=0)) == rows


def test_the_smollm2_recipe_runs(tmp_path):
    backbone, _ = save_all(tmp_path)
    places = {name: tmp_path / name for name in ("out", "results", "card", "features")} | {"backbone": backbone}
    sizes = {
        "fit-prompts": 24,
        "fit-steps": 4,
        "fit-batch": 8,
        "inline-prompts": 2,
        "search-samples": 2,
        "search-lengths": 1500,
    }
    sizes |= {"measurements": 8, "search-batch": 8, "gate-steps": 1, "gate-batch": 2, "gate-lengths": 1500}
    sizes |= {"eval-samples": 1, "eval-length": 1500, "workers": 1, "static-shares": 0.5}
    options = [part for key, value in {**places, **sizes}.items() for part in (f"--{key}", str(value))]
    # Running text only: a random model is within reach of no needle.
    groups = ("code:0.5:code_completion", "text:0.75:prose_continuation", "more:0.5:open_request:=text")
    options += ["--device", "cpu", *(part for group in groups for part in ("--group", group))]
    result = load("smollm2").main(options)
    assert load_adapter(tmp_path / "out").config.full_bias == 0
    written = json.loads((tmp_path / "results").read_text())
    assert written["rankings"] == result["rankings"] and sorted(written["rankings"]["text"]["order"]) == list(
        range(LAYERS)
    )
    policies = [
        "dense",
        "router",
        "static code 0.50",
        "static text 0.50",
        "static text 0.75",
        "static more 0.50",
        "interleaved 0.80",
    ]
    assert list(written["evaluation"]["policies"]) == policies
    assert written["steps_done"] == 1 and set(written["fit_held_out"]) <= {
        "code_completion",
        "prose_continuation",
        "open_request",
    }
    card = (tmp_path / "card").read_text()
    assert f"commit {written['commit']}, seed 0" in card and card.count("\n| static ") == 4
    # A refit from the files of that run searches and probes nothing, counts what they cost, and gives the same router.
    again = load("smollm2").main([*options, "--costs", str(tmp_path / "results"), "--out", str(tmp_path / "again")])
    for name, row in result["rankings"].items():
        assert again["rankings"][name]["costs"] == row["costs"] and again["rankings"][name]["order"] == row["order"]
    assert {n: again["phases"][n]["tokens"] for n in ("probe", "search")} == {
        n: result["phases"][n]["tokens"] for n in ("probe", "search")
    }
    assert again["figures"][0]["value"] * 60 >= sum(result["phases"][n]["seconds"] for n in ("probe", "search"))
    first, second = (load_adapter(tmp_path / name).state for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(mean_ranking(tmp_path / "results")) == list(range(LAYERS))
    with pytest.raises(ValueError, match="no rankings"):
        mean_ranking(tmp_path / "card")
