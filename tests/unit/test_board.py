"""The board: results are kept and shared, runs of other settings never mix, comparisons are paired at equal Ω."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from rich.console import Console

from flux_attention.cli import board as page
from flux_attention.cli import main
from flux_attention.data.sample_set import make_sample_set
from flux_attention.evaluation import board as boards
from flux_attention.evaluation import outcomes
from flux_attention.evaluation.board import Board, BoardRun, UnfinishedError, run_board
from flux_attention.evaluation.board_config import MIXED, BoardConfig
from flux_attention.evaluation.entrants import (
    POLICIES,
    STATIC,
    Entrant,
    by_policy,
    by_size,
    by_threshold,
    mean_omega,
    omega_of,
)
from flux_attention.evaluation.outcomes import Outcome, OutcomeFile, Pair, batches
from flux_attention.evaluation.pool import Pool, PoolModel, all_devices
from flux_attention.evaluation.runner import Record, RunOptions, run_samples
from flux_attention.evaluation.summary import cell_scores, summarise
from flux_attention.models.adapter import Adapter, save_adapter
from flux_attention.models.attach import attach, detach
from flux_attention.models.backbones import load_backbone
from flux_attention.models.controller import FluxAttention
from flux_attention.models.delta import BackboneDelta
from flux_attention.route import AllSparse, Dense, Fixed, PolicyContext, Route, Static
from flux_attention.training.heads import HeadTraining

from .tiny_backbone import CONFIG, LAYERS, make_backbone, make_tokenizer, save_all

TASKS = ("niah_single_2", "fewshot_topic", "docstring_continuation")
CELLS = BoardConfig(
    tasks=TASKS,
    lengths=(900,),
    samples=3,
    weak_samples=2,
    calibration=1,
    calibration_text=1,
    calibration_length=2600,
    heads=HeadTraining(steps=1, batch_size=2),
    head_samples=1,
    head_lengths=(2600,),
)
LIGHT = replace(CELLS, policies=("router",))


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


@pytest.fixture
def any_score(monkeypatch):
    monkeypatch.setattr(boards, "LEAST_DENSE", -1.0)  # a random model answers nothing


def test_a_pass_that_memory_does_not_take_goes_in_parts(model, adapter, monkeypatch):
    (samples,) = make_sample_set([("niah_single_2", 900)], 3, 0, "test", make_tokenizer()).cells.values()
    routes, passes, score = ["0" * LAYERS, "1" * LAYERS, "0" * LAYERS], [], outcomes.score_batch
    controller = attach(model, adapter)
    expected = outcomes.outcomes_of(controller, make_tokenizer(), samples, routes, RunOptions())

    def small(*args):
        passes.append(len(args[2]))
        if passes[-1] > most:
            raise torch.OutOfMemoryError("of a device that others share")
        return score(*args)

    monkeypatch.setattr(outcomes, "score_batch", small)
    most = 1
    found = outcomes.outcomes_of(controller, make_tokenizer(), samples, routes, RunOptions())
    assert passes == [3, 1, 2, 1, 1]
    for a, b in zip(found, expected, strict=True):
        assert a.score == b.score and a.nll == pytest.approx(b.nll, abs=1e-4)
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        outcomes.outcomes_of(controller, make_tokenizer(), samples, routes, RunOptions())
    detach(model)


def make_board(model, adapter, folder, config=LIGHT, **more):
    return Board(model, make_tokenizer(), [adapter], config, folder, **more)


def counted(monkeypatch):
    """The batches that are really run."""
    run, calls = boards.outcomes_of, []

    def counting(controller, tokenizer, samples, routes, options):
        calls.append(list(zip(samples, routes, strict=True)))
        return run(controller, tokenizer, samples, routes, options)

    monkeypatch.setattr(boards, "outcomes_of", counting)
    return calls


def test_a_static_split_by_given_costs_is_an_entrant(model, adapter, tmp_path, any_score):
    order = tuple(reversed(range(LAYERS)))
    config = replace(LIGHT, policies=("router", "searched"), searched=order)
    board = make_board(model, adapter, tmp_path, config)
    cells = board.samples.test.cells
    router = Entrant("router", "router", {cell: ["0" + "1" * (LAYERS - 1)] * len(some) for cell, some in cells.items()})
    (found,) = board.baselines(cells, [router])
    assert (found.family, found.matched) == ("searched", True)
    assert {column for columns in found.columns.values() for column in columns} == {"1" * (LAYERS - 1) + "0"}
    with pytest.raises(ValueError, match="come together"):
        replace(LIGHT, searched=order)


# ------------------------------------------------------------------------------------------------ outcomes


def test_pairs_are_measured_once_and_shared(model, adapter, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    board = make_board(model, adapter, tmp_path)
    cells = board.samples.test.cells
    sparse = Entrant("sparse", "sparse", by_policy(AllSparse(), LAYERS, cells))
    half = Entrant("half", "damage", by_policy(Static((0, 1)), LAYERS, cells))
    board.measure([sparse, half, replace(half, name="the same again")], "test")
    assert sum(map(len, calls)) == 2 * 3 * len(TASKS)
    first = board.records(sparse)
    # In the files: another board has nothing to run.
    again = make_board(model, adapter, tmp_path)
    again.measure([sparse, half], "test")
    assert sum(map(len, calls)) == 2 * 3 * len(TASKS)
    assert again.records(sparse) == first
    assert not hasattr(model, "_flux_attention_controller")


def test_mixed_passes_score_what_single_runs_score(model, adapter, tmp_path):
    board = make_board(model, adapter, tmp_path, replace(LIGHT, batch_tokens=4000))
    cells = board.samples.test.cells
    entrants = [
        Entrant("a", "a", by_policy(policy, LAYERS, cells)) for policy in (AllSparse(), Static((2,)), Static((0, 3)))
    ]
    board.measure(entrants, "test")
    controller = attach(model, adapter.config)
    try:
        for entrant in entrants:
            for cell, records in board.records(entrant).items():
                for record, sample in zip(records, cells[cell], strict=True):
                    route = Route(torch.tensor([[c == "1"] for c in record.route]))
                    (alone,) = run_samples(controller, make_tokenizer(), [sample], policy=Fixed(route))
                    assert record.score == alone.score
                    assert record.nll == pytest.approx(alone.nll, abs=1e-4)
                    assert record.kv_share == pytest.approx(alone.kv_share)
                    assert record.sparsity == pytest.approx(alone.sparsity)
    finally:
        detach(model)


def test_an_interrupted_board_resumes(model, adapter, tmp_path, monkeypatch):
    run, calls = boards.outcomes_of, []

    def stops(controller, tokenizer, samples, routes, options):
        calls.append(samples)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(controller, tokenizer, samples, routes, options)

    monkeypatch.setattr(boards, "outcomes_of", stops)
    config = replace(LIGHT, batch_tokens=1)
    board = make_board(model, adapter, tmp_path, config)
    with pytest.raises(KeyboardInterrupt):
        board.measure([board.dense()], "test")
    assert not hasattr(model, "_flux_attention_controller")
    again = make_board(model, adapter, tmp_path, config)
    again.measure([again.dense()], "test")
    # One pass done, one broken off and done again.
    assert len(calls) == 3 * len(TASKS) + 1


def test_several_processes_measure_what_one_does(adapter, tmp_path):
    backbone, _ = save_all(tmp_path)
    model, tokenizer = load_backbone(backbone)
    config = replace(LIGHT, batch_tokens=2000)
    found = {}
    with Pool(2, PoolModel(str(backbone), torch.float32, ("cpu",), "auto")) as pool:
        for name, share in (("alone", None), ("pool", pool)):
            board = Board(model, tokenizer, [adapter], config, tmp_path / name, pool=share)
            cells = board.samples.test.cells
            entrants = [
                Entrant("a", "a", by_policy(Static((2,)), LAYERS, cells)),
                Entrant("b", "b", by_policy(AllSparse(), LAYERS, cells), mode="triangle"),
            ]
            board.measure(entrants, "test")
            found[name] = [board.records(entrant) for entrant in entrants]
        assert not hasattr(model, "_flux_attention_controller")
        # Stopped for time after the first batch: the rest is not run, and the pool can go on.
        late = Board(model, tokenizer, [adapter], replace(config, minutes=1e-9), tmp_path / "late", pool=pool)
        with pytest.raises(UnfinishedError):
            late.measure([late.dense()], "test")
        bad = Pair(late._file((TASKS[0], 900), None), 0, late.samples.test.cells[TASKS[0], 900][0], "01")
        with pytest.raises(ValueError):
            list(pool.measure(adapter.config, [[bad]], RunOptions()))
    for ours, theirs in zip(found["pool"], found["alone"], strict=True):
        for cell, records in ours.items():
            for a, b in zip(records, theirs[cell], strict=True):
                assert a.score == b.score and a.nll == pytest.approx(b.nll, abs=1e-4)
    with pytest.raises(ValueError, match="at least one process"):
        Pool(0, PoolModel(str(backbone), torch.float32, ("cpu",), "auto"))


def test_processes_take_every_gpu_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert all_devices(torch.device("cuda")) == ("cuda:0", "cuda:1", "cuda:2")
    assert all_devices(torch.device("cuda:1")) == ("cuda:1",)
    assert all_devices(torch.device("cpu")) == ("cpu",)


def test_time_is_kept(model, adapter, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    config = replace(LIGHT, batch_tokens=1, minutes=1e-9)
    board = make_board(model, adapter, tmp_path, config)
    with pytest.raises(UnfinishedError, match="Run the same command again"):
        board.measure([board.dense()], "test")
    assert len(calls) == 1
    rest = make_board(model, adapter, tmp_path, replace(config, minutes=0))
    rest.measure([rest.dense()], "test")
    assert len(calls) == 3 * len(TASKS)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"tasks": ("niah_single_3",)}, {"lengths": (901,)}, {"impl": "reference"}]
)
def test_other_settings_are_other_files(model, adapter, tmp_path, change):
    one, other = make_board(model, adapter, tmp_path), make_board(model, adapter, tmp_path, replace(LIGHT, **change))
    other_cell = (other.config.tasks[0], other.config.lengths[0])
    assert one._file((TASKS[0], 900), None).path != other._file(other_cell, None).path


def test_modes_weights_and_windows_have_files_of_their_own(model, adapter, tmp_path):
    board = make_board(model, adapter, tmp_path)
    wider = Adapter(replace(adapter.config, window_tokens=64), adapter.state, "wider")
    other = make_backbone()
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    cell = (TASKS[0], 900)
    paths = {
        board._file(cell, None).path,
        board._file(cell, "triangle").path,
        make_board(model, wider, tmp_path)._file(cell, None).path,
        make_board(other, adapter, tmp_path)._file(cell, None).path,
    }
    assert len(paths) == 4
    # How many samples there are and how many share a pass does not matter, nor where a route comes from.
    inline = Adapter(replace(adapter.config, router_input="inline"), adapter.state, "inline")
    same = make_board(model, inline, tmp_path, replace(LIGHT, samples=5, batch_tokens=7))
    assert same._file(cell, None).path == board._file(cell, None).path


def test_damaged_and_foreign_files_are_named(model, adapter, tmp_path):
    board = make_board(model, adapter, tmp_path)
    board.measure([board.dense()], "test")
    path = board._file((TASKS[0], 900), None).path
    data = json.loads(path.read_text())
    older = {**data, "settings": {**data["settings"], "version": 0}}
    path.write_text(json.dumps(older))
    with pytest.raises(ValueError, match=r"other settings \(version 0, this is 2\)"):
        make_board(model, adapter, tmp_path)._file((TASKS[0], 900), None)
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        make_board(model, adapter, tmp_path)._file((TASKS[0], 900), None)
    path.write_text(json.dumps({**data, "samples": {"0": 1}}))
    with pytest.raises(ValueError, match="results of other samples"):
        make_board(model, adapter, tmp_path)._file((TASKS[0], 900), None)


def test_batches_hold_their_budget_and_one_kind(tmp_path):
    options = RunOptions()
    cells = [("niah_single_2", 900), ("frequent_words", 900), ("docstring_continuation", 500)]
    made = make_sample_set(cells, 5, 0, "test", make_tokenizer())
    files = {c: OutcomeFile(tmp_path, {"task": c[0], "length": c[1]}, sums) for c, sums in made.checksums.items()}
    pairs = [
        Pair(files[cell], i, sample, route)
        for cell, some in made.cells.items()
        for i, sample in enumerate(some)
        for route in ("0101", "0000", "01010101")
    ]
    found = list(batches(pairs, 2000, options))
    assert sorted(map(id, pairs)) == sorted(id(pair) for batch in found for pair in batch)
    for batch in found:
        generated = options.generates(batch[0].sample)
        assert {options.generates(pair.sample) for pair in batch} == {generated}
        assert len({len(pair.route) for pair in batch}) == 1
        assert sum(len(pair.sample) for pair in batch) <= (8000 if generated else 2000) or len(batch) == 1
    assert len(found) < len(pairs) / 1.5


def test_outcomes_round_trip(tmp_path):
    some = [11, 12]
    file = OutcomeFile(tmp_path, {"task": "t", "length": 1}, some)
    file.put(1, "01", Outcome(0.5, 1.25))
    file.put(0, "00", Outcome(None, 2.0))
    file.save()
    again = OutcomeFile(tmp_path, {"task": "t", "length": 1}, some)
    assert again.get(1, "01") == Outcome(0.5, 1.25) and again.get(0, "00") == Outcome(None, 2.0)
    assert again.get(0, "01") is None


# ------------------------------------------------------------------------------------------------ equal Ω


def test_sizes_between_two_reach_their_sparsity_exactly():
    (some,) = make_sample_set([("niah_single_2", 900)], 60, 0, "test", make_tokenizer()).cells.values()
    cells = {("niah_single_2", 900): some}
    order = [2, 0, 3, 1]
    columns = by_size(lambda n: Static(tuple(order[:n])), 1.6, 4, cells)[("niah_single_2", 900)]
    assert set(columns) == {"1101", "0101"}
    assert np.mean([omega_of(column) for column in columns]) == pytest.approx(0.4, abs=2 * 0.25 / 60)
    (whole,) = by_size(lambda n: Static(tuple(order[:n])), 2.0, 4, cells).values()
    assert set(whole) == {"0101"}


def test_threshold_of_heads_meets_the_mean():
    generator = torch.Generator().manual_seed(0)
    scores = {("niah_single_2", 1): torch.rand(8, 50, generator=generator), ("fewshot_topic", 1): torch.rand(8, 20)}
    weights = {("niah_single_2", 1): 0.5, ("fewshot_topic", 1): 0.5}
    columns = by_threshold(scores, weights, 0.7, 4)
    assert mean_omega(columns, weights) == pytest.approx(0.7, abs=0.01)
    # Of one prompt the heads with the lowest scores run sparse.
    p, column = scores["niah_single_2", 1][:, 3], columns["niah_single_2", 1][3]
    full = [float(x) for x, c in zip(p, column, strict=True) if c == "1"]
    sparse = [float(x) for x, c in zip(p, column, strict=True) if c == "0"]
    assert min(full) > max(sparse)


def record(task, kind, score=None, nll=None, sparsity=0.0, metric="exact_match"):
    metric = "nll" if score is None else metric
    route = "0" * round(4 * sparsity) + "1" * (4 - round(4 * sparsity))
    return Record(task, kind, metric, 900, 0, 800, score, None, nll, sparsity, route, None, 1 - sparsity / 2)


def test_nll_counts_relative_to_dense():
    cell = ("docstring_continuation", 1)
    dense = {cell: [record(cell[0], "holistic", nll=2.0)]}
    worse = {cell: [record(cell[0], "holistic", nll=2.1)]}
    assert cell_scores(dense, dense)["docstring_continuation@1"] == pytest.approx([1.0])
    assert cell_scores(worse, dense)["docstring_continuation@1"] == pytest.approx([math.exp(-0.1)])


def made_run():
    """Retrieval breaks when layer 0 is sparse; the router spares it there only, at the same mean Ω."""
    rng = np.random.default_rng(0)
    dense, routed, static = ({}, {}, {})
    for task, kind in (("niah_single_2", "retrieval"), ("fewshot_intent", "holistic")):
        good = (rng.random(60) < 0.9).astype(float)
        cell = (task, 900)
        dense[cell] = [record(task, kind, score=s) for s in good]
        omega = 0.5 if kind == "retrieval" else 1.0
        routed[cell] = [record(task, kind, score=s, sparsity=omega) for s in good]
        broken = good * (rng.random(60) < 0.5) if kind == "retrieval" else good
        static[cell] = [record(task, kind, score=s, sparsity=0.75) for s in broken]
    weak = {cell: rows[:20] for cell, rows in static.items()}
    others = [
        *((Entrant(f"{family} 0.75", family, {}, matched=True), static) for family in STATIC),
        (Entrant("random 0.75", "random", {}, matched=True), weak),
        (Entrant("inline", "inline", {}), weak),
    ]
    routers = [(Entrant(f"router (seed {i})", "router", {}), routed) for i in range(3)]
    return BoardRun(dense, routers, others, 0.75, {("row_qa", 900): 0.02})


def test_a_board_without_all_static_splits_has_not_met_the_best():
    run = made_run()
    some = replace(run, others=[other for other in run.others if other[0].family != "duo"])
    names = {figure.name for figure in summarise(some).figures}
    assert "board_margin_over_some_static_low" in names and "board_margin_over_best_static_low" not in names


def test_what_adapters_do_otherwise_has_names_of_its_own_and_replaces_no_board():
    run = made_run()
    beside = [
        (Entrant(name, family, {}), run.routers[0][1]) for name, family in (("dial 0.50", "dial"), ("A-1", "other"))
    ]
    whole = summarise(replace(run, others=[*run.others, *beside]))
    curves = {f"board_{name}_{what}" for name in ("dial_0_50", "a_1") for what in ("macro", "sparsity")}
    curves |= {"board_probe_minus_inline"}
    assert {figure.name for figure in whole.curves} == curves
    assert whole.recorded == ("board", whole.figures) and set(whole.curves) < set(whole.figures)
    alone = summarise(replace(run, others=beside))
    name, figures = alone.recorded
    assert name == "board-curves" and {figure.name for figure in figures} == curves - {"board_probe_minus_inline"}


def test_a_router_that_knows_better_than_static_wins():
    outcome = summarise(made_run())
    figures = {figure.name: figure for figure in outcome.figures}
    assert outcome.left_out == (("row_qa@900", 0.02),)
    assert figures["board_mean_sparsity"].repetitions == (0.75,) * 3
    assert figures["board_retrieval_vs_dense"].value == pytest.approx(1.0)
    assert figures["board_margin_over_best_static_low"].value > 5
    assert 15 < figures["board_margin_over_best_static"].value < 30
    assert figures["board_unseen_tasks_vs_dense"].value == pytest.approx(1.0)
    assert figures["board_class_sparsity_gap"].value == pytest.approx(0.5)
    assert figures["board_probe_minus_inline"].value > 5
    rows = {row.name: row for row in outcome.rows}
    assert {row.family for row in outcome.rows} == {"router", "seed", "dense", "random", "inline", *STATIC}
    static, weak = rows["damage 0.75"], rows["random 0.75"]
    assert static.margin is not None and static.macro.value == pytest.approx(
        (static.retrieval.value + static.holistic.value) / 2, abs=1e-9
    )
    # A baseline on few samples is compared on these.
    assert weak.samples == 20 and weak.margin is not None and weak.margin.n == 40
    assert rows["inline"].margin is None
    text = page.markdown(outcome, page.summary(outcome.rows))
    assert "row_qa@900 (0.02)" in text and "**router**" in text and POLICIES["damage"] in text


# ------------------------------------------------------------------------------------------------ whole


def test_whole_board_runs_and_repeats(model, adapter, tmp_path, monkeypatch, any_score):
    config = replace(CELLS, tasks=(*TASKS, "frequent_words"), samples=2, dial=(0.5,))
    other = Adapter(adapter.config, {n: t + 1 for n, t in adapter.state.items()}, "other")
    board = Board(model, make_tokenizer(), [adapter, adapter], config, tmp_path, others={"single": other})
    first = summarise(run_board(board))
    families = {row.family for row in first.rows}
    assert set(POLICIES) - {"searched"} | {"dense", "seed", "dial", "other"} == families
    assert {row.family for row in first.rows if row.margin} == {
        "greedy-text", "damage", "greedy", "duo", "elastic", "interleaved", "random"
    }  # fmt: skip
    matched = [row.sparsity for row in first.rows if row.family in ("damage", "greedy-text", "greedy")]
    assert matched == pytest.approx([first.omega] * 3, abs=0.01)
    # Routes by KV head have no cache to generate with, and stand at the routers' Ω on the other tasks.
    own = {cell: some for cell, some in board.samples.test.cells.items() if cell[0] != "frequent_words"}
    for family in ("duo", "elastic"):
        row = next(row for row in first.rows if row.family == family)
        assert "frequent_words@900" not in row.cells and len(row.cells) == 3
        assert row.sparsity == pytest.approx(boards.routers_omega(board.routers(own), own), abs=0.02)
    assert set(first.routes) == set(config.tasks)
    calls = counted(monkeypatch)
    # Nobody decides anew what the files hold: another device's rounding would decide otherwise here and there.
    for name in ("route", "probe"):
        monkeypatch.setattr(FluxAttention, name, lambda *args, **kwargs: pytest.fail("a prompt is routed again"))
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: pytest.fail("a prompt is read again"))
    again = Board(model, make_tokenizer(), [adapter, adapter], config, tmp_path, others={"single": other})
    second = summarise(run_board(again))
    assert not calls and second.rows == first.rows and second.figures == first.figures


def test_tasks_that_dense_cannot_do_are_run_by_nobody_else(model, adapter, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    config = replace(LIGHT, tasks=("niah_single_2", "docstring_continuation"), policies=("router", "sparse"))
    run = run_board(make_board(model, adapter, tmp_path, config))
    assert list(run.left_out) == [("niah_single_2", 900)] and list(run.dense) == [("docstring_continuation", 900)]
    assert {route for batch in calls for sample, route in batch if sample.task == "niah_single_2"} == {"1111"}
    with pytest.raises(ValueError, match="nothing to compare"):
        run_board(make_board(model, adapter, tmp_path, replace(LIGHT, tasks=("niah_single_2",))))


def test_router_scores_are_kept_by_router(model, adapter, tmp_path):
    board = make_board(model, adapter, tmp_path)
    cells = board.samples.test.cells
    changed = Adapter(adapter.config, {n: t + 1 for n, t in adapter.state.items()}, adapter.source)
    for one in (adapter, adapter, changed):
        board._scores(one, cells)
    assert len(list(tmp_path.glob("routes-*.safetensors"))) == 2
    (path, _) = sorted(tmp_path.glob("routes-*.safetensors"))
    path.write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="is damaged"):
        [board._scores(one, cells) for one in (adapter, changed)]


def test_routers_under_a_dial(model, adapter, tmp_path):
    free = make_board(model, adapter, tmp_path)
    held = make_board(model, adapter, tmp_path, replace(LIGHT, min_sparsity=0.7, max_sparsity=0.8))
    cells = free.samples.test.cells
    (loose,), (tight,) = (board.routers(cells) for board in (free, held))
    assert {omega_of(column) for columns in tight.columns.values() for column in columns} == {0.75}
    assert tight.columns != loose.columns
    # The scores are the router's, and are not asked for twice.
    assert len(list(tmp_path.glob("routes-*.safetensors"))) == 1
    outcome = summarise(run_board(held))
    assert outcome.omega == 0.75 and "held between 0.7 and 0.8" in page.markdown(outcome, page.summary(outcome.rows))


def test_adapters_that_change_the_backbone_have_no_board(model, adapter, tmp_path):
    delta = BackboneDelta.write(tmp_path, {"model.layers.0.self_attn.q_proj.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="replaces weights of the backbone"):
        make_board(model, replace(adapter, delta=delta), tmp_path)


def test_results_are_named_by_the_code_that_scores(tmp_path):
    for folder in ("kernels", "evaluation"):
        (tmp_path / folder).mkdir()
    (tmp_path / "kernels" / "dense.py").write_text("1")
    (tmp_path / "evaluation" / "runner.py").write_text("1")
    names = ("kernels", "evaluation/runner.py")
    first = boards.files_digest(tmp_path, names)
    assert first == boards.files_digest(tmp_path, names)
    (tmp_path / "evaluation" / "runner.py").write_text("2")
    assert boards.files_digest(tmp_path, names) != first
    assert len(boards.code_digest()) == 16


def test_what_would_share_a_name_is_refused(adapter, tmp_path):
    with pytest.raises(ValueError, match="told apart by two digits"):
        replace(LIGHT, dial=(0.5, 0.504))
    others = [str(tmp_path / place / "adapter") for place in ("a", "b")]
    for place in others:
        save_adapter(place, adapter.config, adapter.state)
    console = Console(quiet=True)
    run = partial(page.run, LIGHT, "none", [], tmp_path, others=others, commit=None, console=console, notes=console)
    with pytest.raises(ValueError, match="names of their folders"):
        run(only_prepare=True, only_report=False, device="cpu", dtype="auto", record=False)


def test_probe_routes_are_the_routers(model, adapter, tmp_path):
    board = make_board(model, adapter, tmp_path)
    cells = board.samples.test.cells
    (router,) = board.routers(cells)
    controller = attach(model, adapter)
    try:
        for cell, some in cells.items():
            for column, sample in zip(router.columns[cell], some, strict=True):
                assert controller.route([torch.tensor(sample.prompt_ids)]).column(0) == column
    finally:
        detach(model)


def test_mixed_suite_is_half_and_half_and_has_unseen_kinds():
    from flux_attention.data import HOLISTIC, RETRIEVAL, TASKS, training_tasks

    assert [sum(TASKS[t].task_class == c for t in MIXED) for c in (RETRIEVAL, HOLISTIC)] == [8, 8]
    unseen = [TASKS[task] for task in MIXED if TASKS[task].held_out]
    assert len(unseen) >= 5
    # At least four kinds of which the training tasks hold no variant at all.
    trained = {(type(task), getattr(task, "values_per_key", None)) for task in training_tasks().values()}
    kinds = {(type(task), getattr(task, "values_per_key", None)) for task in TASKS.values() if task.held_out}
    assert len({kind[0] for kind in kinds - trained}) >= 4


def test_policy_context_is_what_policies_see():
    (some,) = make_sample_set([("niah_single_2", 900)], 2, 0, "test", make_tokenizer()).cells.values()
    found = by_policy(Dense(), 4, {("a", 1): some})
    assert found == {("a", 1): ["1111", "1111"]}
    assert Dense()(PolicyContext(4, ())).num_sequences == 0


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("guess",)}, "unknown task 'guess'"),
        ({"tasks": ("needle1", "niah_single_2")}, "each once"),
        ({"samples": 1}, "samples must be at least 2"),
        ({"weak_samples": 1}, "weak_samples must be at least 2"),
        ({"lengths": ()}, "lengths must be positive"),
        ({"lengths": (900, 900)}, "each once"),
        ({"policies": ("router", "oracle")}, "unknown policy 'oracle'; known: router, "),
        ({"policies": ("damage",)}, "must include the router"),
        ({"sparsities": (1.5,)}, r"sparsities must lie in \[0, 1\]"),
        ({"dial": (-0.5,)}, r"dial must lie in \[0, 1\]"),
        ({"min_sparsity": 0.8, "max_sparsity": 0.5}, "is above max_sparsity"),
        ({"min_sparsity": 0.5}, "no dial holds them"),
        ({"minutes": -1.0}, "minutes must not be negative"),
        ({"batch_tokens": 0}, "batch_tokens must be positive"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        BoardConfig(**options)


def test_a_length_beyond_the_context(model, adapter, tmp_path):
    board = make_board(model, adapter, tmp_path, replace(LIGHT, lengths=(9000,), tasks=("docstring_continuation",)))
    with pytest.raises(ValueError, match="needs 9000 tokens, the model's context has 8192"):
        run_board(board)
    assert not hasattr(model, "_flux_attention_controller")


def test_adapters_of_one_board(model, adapter, tmp_path):
    with pytest.raises(ValueError, match="at least one adapter"):
        Board(model, make_tokenizer(), [], LIGHT, tmp_path)
    wider = Adapter(replace(adapter.config, window_tokens=64), adapter.state, "wider")
    with pytest.raises(ValueError, match="differ in more than their router"):
        Board(model, make_tokenizer(), [adapter, wider], LIGHT, tmp_path)


def test_command_line(tmp_path, capsys, any_score):
    backbone, adapter = save_all(tmp_path)
    options = ["--tasks", "needle1,fewshot_topic,docstring_continuation", "--lengths", "900", "--samples", "2"]
    options += ["--policies", "router,sparse,interleaved", "--impl", "sdpa", "--out", str(tmp_path / "board")]
    call = ["board", "--model", str(backbone), "--adapter", str(adapter), "--device", "cpu", "--workers", "1", *options]
    with pytest.raises(SystemExit) as exit_:
        main([*call, "--prepare"])
    assert not exit_.value.code
    assert len(list((tmp_path / "board").iterdir())) == 1
    with pytest.raises(SystemExit) as exit_:
        main(call)
    assert not exit_.value.code, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "router" in out and "board_mean_sparsity" in out
    folder = tmp_path / "board"
    data = json.loads((folder / "board.json").read_text())
    assert data["settings"]["samples"] == 2 and len(data["routes"]["niah_single_2"]) == LAYERS
    assert data["settings"]["impl"] == "sdpa" and data["settings"]["policies"] == ["router", "sparse", "interleaved"]
    assert "<svg" in (folder / "board.html").read_text()
    assert (folder / "pareto.png").is_file() and "| router" in (folder / "board.md").read_text().replace("**", "")
    with pytest.raises(SystemExit) as exit_:
        main([*call, "--policies", "guess"])
    assert exit_.value.code == 2 and "unknown policy 'guess'" in capsys.readouterr().err
