"""The recipes run as they are, on a tiny backbone in the place of theirs."""

import importlib.util
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from flux_attention.models.adapter import load_adapter
from flux_attention.models.attach import attach
from flux_attention.training.build import build
from flux_attention.training.card import mean_ranking
from flux_attention.training.launch import main
from flux_attention.training.meter import CostMeter
from flux_attention.training.sources import Rows

from .tiny_backbone import CONFIG, LAYERS, make_backbone, make_tokenizer, save_all

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
    # Features of the same prompts that another backbone, or one in another precision, would not have.
    other = make_backbone()
    other.model.embed_tokens.weight.data[:2] += 1
    other.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    options += ["--costs", str(tmp_path / "results"), "--out", str(tmp_path / "never")]
    for changes, message in (
        (["--backbone", str(tmp_path / "other")], r"weights: \w+ → \w+\. Delete"),
        (["--dtype", "bfloat16"], "dtype: float32 → bfloat16"),
    ):
        with pytest.raises(SystemExit, match=f"features holds features of .*{message}"):
            load("smollm2").main([*options, *changes])


def test_features_are_those_of_their_prompts_and_settings(tmp_path):
    recipe, path = load("smollm2"), tmp_path / "features"
    samples = [SimpleNamespace(prompt_ids=tuple(range(5, 5 + n)), answer_ids=(1,)) for n in (40, 60)]

    def probe(samples=samples, weights="w", **changes):
        controller = attach(make_backbone(), replace(CONFIG, **changes))
        return recipe.probe(controller, samples, path, CostMeter(controller), weights)

    first = probe()
    assert torch.equal(probe(), first)
    # What the sparse side reads is nothing to a probe's file.
    for changes, message in (
        ({"samples": samples[:1]}, "samples: "),
        ({"weights": "v"}, "weights: w → v"),
        ({"pool_tokens": 12}, "pool_tokens: 8 → 12"),
        ({"tail_tokens": 4}, "tail_tokens: 0 → 4"),
    ):
        with pytest.raises(SystemExit, match=rf"\(then → now\): {message}"):
            probe(**changes)
    # A file from before there were such settings in it.
    save_file({"pooled": first}, path, {"samples": "x", "seconds": "1", "tokens": "1"})
    with pytest.raises(SystemExit, match="dtype: None → float32"):
        probe()


SIZES = ("--fit-prompts", "8", "--search-lengths", "1500", "--measurements", "8")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            ["a:98%:kv_lookup"],
            "group a: the Ω that keeps 0.98 .* give an Ω such as 0.7, or .*=other.* or .*--costs",
        ),
        (["a:1:kv_lookup"], "group a: at Ω = 1 no layer is left .* give an Ω below 1, or take"),
        (["a:0.5:kv_lookup:=b", "b:0.5:kv_lookup"], "a shares the ranking of 'b', which must come before it"),
    ],
)
def test_groups_that_cannot_be_searched_are_refused_at_once(tmp_path, capsys, groups, message):
    recipe = load("smollm2")
    options = ["--out", str(tmp_path), *SIZES, *(part for group in groups for part in ("--group", group))]
    with pytest.raises(SystemExit):
        recipe.parse_arguments(options)
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_groups_that_are_not_searched_may_have_any_target(tmp_path, capsys):
    recipe, earlier = load("smollm2"), tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"rankings": {"a": {}}}))
    options = ["--out", str(tmp_path), *SIZES, "--costs", str(earlier)]
    for target in ("98%", "1"):
        groups = ["--group", f"a:{target}:kv_lookup", "--group", f"b:{target}:kv_lookup:=a"]
        assert recipe.searched(recipe.parse_arguments([*options, *groups])) == []
    # A chain ends at the group that has a ranking, the only one that the log and its card have a row of.
    chain = ["a:0.5:kv_lookup", "b:0.6:kv_lookup:=a", "c:98%:kv_lookup:=b"]
    found = recipe.parse_arguments([*options, *(part for group in chain for part in ("--group", group))])
    assert [group.like for group in found.group] == ["", "a", "a"]
    for text in ("{}", "[]", '{"rankings": []}', "no JSON"):
        (tmp_path / "bad.json").write_text(text)
        recipe.read_run.cache_clear()
        with pytest.raises(SystemExit):
            recipe.parse_arguments([*options, "--costs", str(tmp_path / "bad.json"), "--group", chain[0]])
        assert "bad.json holds no rankings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        recipe.parse_arguments([*options[:2], *SIZES[:-1], "0", "--group", chain[0]])
    assert "--measurements of at least 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rankings", "message"),
    [
        ({}, 'holds no rankings of a recipe\'s run: "rankings" is empty'),
        ([], "holds no rankings"),
        ({"a": {"costs": [1.0]}}, "holds no rankings.*'order'"),
        ({"a": {"order": [1, 1]}}, "holds no rankings.*lists every layer from 0 to 1 once"),
        (
            {"a": {"order": [0, 1]}, "b": {"order": [0, 2, 1]}},
            r'holds "rankings" of different numbers of layers: \[2, 3\]',
        ),
    ],
)
def test_a_file_without_rankings_is_named(tmp_path, rankings, message):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"rankings": rankings}))
    with pytest.raises(ValueError, match=rf"costs\.json {message}"):
        mean_ranking(path)
