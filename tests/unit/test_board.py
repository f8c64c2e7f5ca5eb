"""The board: cells resume and never mix settings, comparisons are paired at equal Ω."""

import json
import math

import numpy as np
import pytest
import torch

from flux_attention.cli import board as page
from flux_attention.cli import main
from flux_attention.evaluation import board as boards
from flux_attention.evaluation.board import Board, BoardConfig, Entrant, around, at_omega, cell_scores, run_board
from flux_attention.evaluation.runner import Record
from flux_attention.models.adapter import Adapter
from flux_attention.models.attach import attach, detach
from flux_attention.route import AllSparse, Dense, Dial, Static

from .tiny_backbone import CONFIG, LAYERS, make_backbone, make_tokenizer, save_all

CELLS = BoardConfig(
    tasks=("needle1", "fewshot_topic", "docstring_continuation"),
    lengths=(900,),
    samples=3,
    calibration=1,
    calibration_length=1300,
)


@pytest.fixture(scope="module")
def model():
    return make_backbone()


@pytest.fixture(scope="module")
def adapter(model):
    controller = attach(model, CONFIG)
    with torch.no_grad():
        controller.router.biases[-1][0, 0] = 50.0
    state = {name: tensor.clone() for name, tensor in controller.router.state_dict().items()}
    config = controller.config
    detach(model)
    return Adapter(config, state, "test")


def make_board(model, adapter, folder, config=CELLS, **more):
    return Board(model, make_tokenizer(), [adapter], config, folder, **more)


def test_cells_are_kept_and_read(model, adapter, tmp_path, monkeypatch):
    board = make_board(model, adapter, tmp_path)
    first = board.run(Entrant("sparse", "sparse", AllSparse()))
    assert list(first) == ["niah_single_2@900", "fewshot_topic@900", "docstring_continuation@900"]
    assert len(list((tmp_path / "cells").glob("*.json"))) == 3
    monkeypatch.setattr(boards, "run_samples", None)  # nothing may run a second time
    assert make_board(model, adapter, tmp_path).run(Entrant("other name", "x", AllSparse())) == first
    assert not hasattr(model, "_flux_attention_controller")


def test_an_interrupted_board_resumes(model, adapter, tmp_path, monkeypatch):
    run, calls = boards.run_samples, []

    def stops(*args, **more):
        calls.append(more["label"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*args, **more)

    monkeypatch.setattr(boards, "run_samples", stops)
    with pytest.raises(KeyboardInterrupt):
        make_board(model, adapter, tmp_path).run(Entrant("dense", "dense", Dense()))
    assert not hasattr(model, "_flux_attention_controller")
    make_board(model, adapter, tmp_path).run(Entrant("dense", "dense", Dense()))
    assert len(calls) == 4  # one done, one broken off and done again, one new


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 4},
        {"seed": 1},
        {"tasks": ("needle4",)},
        {"lengths": (901,)},
    ],
)
def test_other_settings_are_other_cells(model, adapter, tmp_path, change):
    from dataclasses import replace

    one, other = make_board(model, adapter, tmp_path), make_board(model, adapter, tmp_path, replace(CELLS, **change))
    entrant = Entrant("dense", "dense", Dense())
    key = (CELLS.tasks[0], CELLS.lengths[0])
    other_key = (other.config.tasks[0], other.config.lengths[0])
    assert boards.digest(one.settings(entrant, *key)) != boards.digest(other.settings(entrant, *other_key))


def test_entrants_and_routers_have_cells_of_their_own(model, adapter, tmp_path):
    board = make_board(model, adapter, tmp_path)
    changed = Adapter(adapter.config, {n: t + 1 for n, t in adapter.state.items()}, adapter.source)
    entrants = [
        Entrant("a", "a", Dense()),
        Entrant("a", "a", AllSparse()),
        Entrant("a", "a", AllSparse(), sparse_mode="triangle"),
        Entrant("a", "a", Static((1,))),
        Entrant("a", "a", adapter=adapter),
        Entrant("a", "a", adapter=changed),
        Entrant("a", "a", adapter=adapter, dial=Dial(0.5, 0.5)),
    ]
    digests = {boards.digest(board.settings(entrant, "needle1", 900)) for entrant in entrants}
    assert len(digests) == len(entrants)
    # How many samples share a pass does not matter.
    assert board.settings(entrants[0], "needle1", 900) == make_board(
        model, adapter, tmp_path, BoardConfig(samples=3, batch_size=7)
    ).settings(entrants[0], "needle1", 900)


def test_damaged_and_foreign_files_are_named(model, adapter, tmp_path):
    board = make_board(model, adapter, tmp_path)
    entrant = Entrant("dense", "dense", Dense())
    board.run(entrant)
    path = next((tmp_path / "cells").glob("niah*.json"))
    data = json.loads(path.read_text())
    data["settings"]["version"] = 0
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"other settings \(version 0, this is 1\)"):
        board.run(entrant)
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        board.run(entrant)


def record(task, kind, score=None, nll=None, sparsity=0.0, metric="exact_match"):
    metric = "nll" if score is None else metric
    route = "0" * round(4 * sparsity) + "1" * (4 - round(4 * sparsity))
    return Record(task, kind, metric, 900, 0, 800, score, None, nll, sparsity, route, None, 1 - sparsity / 2)


def test_nll_counts_relative_to_dense():
    dense = {"t@1": [record("t", "holistic", nll=2.0)]}
    worse = {"t@1": [record("t", "holistic", nll=2.1)]}
    assert cell_scores(dense, dense)["t@1"] == pytest.approx([1.0])
    assert cell_scores(worse, dense)["t@1"] == pytest.approx([math.exp(-0.1)])


def test_equal_omega_lies_between_two_splits():
    low, high = {"t": np.array([1.0, 0.0])}, {"t": np.array([0.0, 0.0])}
    assert at_omega([(0.5, low), (0.75, high)], 0.625)["t"] == pytest.approx([0.5, 0.0])
    assert at_omega([(0.5, low), (0.75, high)], 0.5)["t"] == pytest.approx([1.0, 0.0])
    assert at_omega([(0.5, low)], 0.75) is None
    assert around(0.5, 4) == (2, 2) and around(0.6, 4) == (2, 3)


def test_a_router_that_knows_better_than_static_wins(model, adapter, tmp_path):
    """Retrieval breaks when layer 0 is sparse; the router spares it there only, at the same mean Ω."""
    rng = np.random.default_rng(0)
    dense, routed, static = ({}, {}, {})
    for task, kind in (("niah_single_2", "retrieval"), ("fewshot_intent", "holistic")):
        good = (rng.random(60) < 0.9).astype(float)
        key = f"{task}@900"
        dense[key] = [record(task, kind, score=s) for s in good]
        omega = 0.5 if kind == "retrieval" else 1.0
        routed[key] = [record(task, kind, score=s, sparsity=omega) for s in good]
        broken = good * (rng.random(60) < 0.5) if kind == "retrieval" else good
        static[key] = [record(task, kind, score=s, sparsity=0.75) for s in broken]
    # A task that dense cannot do counts for nothing.
    for records in (dense, routed, static):
        records["row_qa@900"] = [record("row_qa", "retrieval", score=0.0, sparsity=0.75)] * 60
    board = make_board(model, adapter, tmp_path)
    omega = boards.mean_omega({k: v for k, v in routed.items() if "row_qa" not in k})
    assert omega == 0.75
    others = {"dense": ("dense", dense), "static damage 0.75": ("static damage", static)}
    outcome = boards.summarise(board, dense, [routed], others, omega)
    figures = {figure.name: figure for figure in outcome.figures}
    assert outcome.left_out == (("row_qa@900", 0.0),)
    assert figures["board_retrieval_vs_dense"].value == pytest.approx(1.0)
    assert figures["board_margin_over_best_static_low"].value > 5
    assert 15 < figures["board_margin_over_best_static"].value < 30
    assert figures["board_unseen_tasks_vs_dense"].value == pytest.approx(1.0)
    row = next(row for row in outcome.rows if row.family == "static damage")
    assert row.margin is not None and row.macro.value == pytest.approx(
        (row.retrieval.value + row.holistic.value) / 2, abs=1e-9
    )
    text = page.markdown(outcome, page.summary(outcome.rows))
    assert "row_qa@900 (0.00)" in text and "**router**" in text


def test_whole_board_runs_and_repeats(model, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(boards, "LEAST_DENSE", -1.0)  # a random model answers nothing
    # Rankings come from measured damage; a random model leaves no needle to measure, but text remains.
    first = run_board(make_board(model, adapter, tmp_path))
    names = {row.name for row in first.rows}
    assert {"router", "dense", "all sparse", "triangle everywhere", "xattention everywhere"} <= names
    assert any(name.startswith("static greedy-text") for name in names)
    monkeypatch.setattr(boards, "run_samples", None)
    assert run_board(make_board(model, adapter, tmp_path)) == first
    assert set(first.routes) == set(CELLS.tasks) | {"niah_single_2"} - {"needle1"} or "niah_single_2" in first.routes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("guess",)}, "unknown task 'guess'"),
        ({"tasks": ("needle1", "niah_single_2")}, "each once"),
        ({"samples": 1}, "at least 2"),
        ({"lengths": ()}, "lengths must be positive"),
        ({"sparsities": (1.5,)}, r"sparsities must lie in \[0, 1\]"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        BoardConfig(**options)


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(boards, "LEAST_DENSE", -1.0)
    backbone, adapter = save_all(tmp_path)
    options = ["--tasks", "needle1,fewshot_topic,docstring_continuation", "--lengths", "900", "--samples", "2"]
    options += ["--calibration", "1", "--calibration-length", "1300", "--out", str(tmp_path / "board")]
    with pytest.raises(SystemExit) as exit_:
        main(["board", "--model", str(backbone), "--adapter", str(adapter), "--device", "cpu", *options])
    assert not exit_.value.code, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "router" in out and "board_mean_sparsity" in out
    folder = tmp_path / "board"
    data = json.loads((folder / "board.json").read_text())
    assert data["settings"]["samples"] == 2 and len(data["routes"]["niah_single_2"]) == LAYERS
    assert "<svg" in (folder / "board.html").read_text()
    assert (folder / "pareto.png").is_file() and "| router" in (folder / "board.md").read_text().replace("**", "")
