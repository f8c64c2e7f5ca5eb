"""Scores, records and results files: what is measured is what a plain forward pass and a real cache say."""

import json
import math
from dataclasses import replace

import pytest
import torch

from flux_attention.data import Sample, make_samples
from flux_attention.evaluation import results, runner, suites
from flux_attention.evaluation.metrics import Estimate
from flux_attention.evaluation.results import Figure
from flux_attention.evaluation.runner import Record, RunOptions, evaluate, kv_share, run_samples
from flux_attention.models.attach import attach, detach
from flux_attention.route import AllSparse, Dense, Dial, Random, Route

from .tiny_backbone import CONFIG, LAYERS, make_backbone, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return make_backbone()


@pytest.fixture
def controller(model):
    yield attach(model, CONFIG)
    detach(model)


@pytest.fixture(scope="module")
def samples(tokenizer):
    # Odd lengths, below and above what is routed.
    return [s for length in (703, 1201) for s in make_samples("needle1", 2, length, 0, "test", tokenizer)]


def test_dense_scores_equal_a_plain_forward_pass(model, tokenizer, samples):
    controller = attach(model, CONFIG)
    records = run_samples(controller, tokenizer, samples, policy=Dense(), options=RunOptions(batch_size=3))
    detach(model)
    for sample, record in zip(samples, records, strict=True):
        ids = torch.tensor([*sample.prompt_ids, *sample.answer_ids])[None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1]
        targets = torch.tensor(sample.answer_ids)
        assert record.nll == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), abs=1e-4)
        assert record.exact == bool((logits.argmax(-1) == targets).all())
        assert (record.sparsity, record.route, record.kv_share) == (0.0, "1" * LAYERS, 1.0)
        assert record.tokens == len(sample.prompt_ids)


@pytest.mark.parametrize("policy", [None, AllSparse(), Random(0.5)], ids=["router", "sparse", "random"])
@pytest.mark.parametrize("scoring", ["forced", "generated"])
def test_batches_change_nothing(controller, tokenizer, samples, policy, scoring):
    alone, packed = (
        run_samples(controller, tokenizer, samples, policy=policy, options=RunOptions(batch_size=b, scoring=scoring))
        for b in (1, 4)
    )
    for one, other in zip(alone, packed, strict=True):
        assert one.route == other.route
        if scoring == "forced":
            assert one.nll == pytest.approx(other.nll, abs=1e-4)
            other = replace(other, nll=one.nll, p_full=one.p_full)
        else:
            other = replace(other, p_full=one.p_full)
        assert one == other


def test_logits_are_scored_in_parts(controller, tokenizer, samples, monkeypatch):
    options = RunOptions(batch_size=len(samples), scoring="forced")
    whole = run_samples(controller, tokenizer, samples, options=options)
    monkeypatch.setattr(runner, "_SCORED", 1)
    assert run_samples(controller, tokenizer, samples, options=options) == whole


def test_only_the_prompt_is_routed(controller, tokenizer, samples):
    records = run_samples(controller, tokenizer, samples)
    for sample, record in zip(samples, records, strict=True):
        route = controller.route([torch.tensor(sample.prompt_ids)])
        assert record.route == "".join(str(int(x)) for x in route.use_full[:, 0])
        assert record.p_full == pytest.approx(route.p_full[:, 0].tolist(), abs=1e-5)


def test_dial_and_policy_end_with_the_run(controller, tokenizer, samples):
    records = run_samples(controller, tokenizer, samples[:1], dial=Dial(0.75, 0.75))
    assert records[0].sparsity == 0.75
    assert controller.policy is None and controller.dial.is_open


def test_same_arguments_same_records(controller, tokenizer):
    first, second = (evaluate(controller, tokenizer, ["needle1"], [600], 2, seed=3) for _ in range(2))
    assert first == second
    assert [Record.from_dict(json.loads(json.dumps(r.to_dict()))).route for r in first] == [r.route for r in first]


def test_nll_tasks_have_no_score_and_never_generate(controller, tokenizer):
    records = evaluate(
        controller, tokenizer, ["docstring_continuation"], [900], 2, options=RunOptions(scoring="generated")
    )
    assert all(r.score is None and r.text is None and r.nll > 0 for r in records)


@pytest.mark.parametrize("tokens", [17, 48, 49, 127, 128, 333])
def test_kv_share_is_what_a_cache_holds(controller, tokens):
    prompt = torch.randint(3, 200, (1, tokens))
    for policy in (Dense(), AllSparse(), Random(0.5)):
        cache = controller.new_cache()
        with controller.using(policy):
            controller.decoder(input_ids=prompt, past_key_values=cache, use_cache=True)
        assert kv_share(CONFIG, cache.route, [tokens]) == pytest.approx([cache.memory().share])


def test_kv_share_of_modes_that_keep_their_cache():
    route = Route(torch.zeros(LAYERS, 1, dtype=torch.bool))
    assert kv_share(replace(CONFIG, sparse_mode="triangle"), route, [1000]) == [1.0]


def test_too_long_a_sample_is_refused_before_anything_runs(controller, tokenizer):
    sample = Sample("needle", "retrieval", tuple([5] * 9000), (5,), ("x",), "exact_match", meta={"length": 9001})
    with pytest.raises(ValueError, match=r"length 9001 needs 9001 tokens.*context has 8192"):
        run_samples(controller, tokenizer, [sample])


@pytest.mark.parametrize(("field", "value"), [("batch_size", 0), ("scoring", "guess"), ("extra_tokens", -1)])
def test_options_are_checked(field, value):
    with pytest.raises(ValueError, match=field):
        RunOptions(**{field: value})


def test_a_suite_pairs_routed_with_dense(controller, tokenizer):
    suite = replace(suites.get_suite("continuation"), lengths=(900,), kv_tasks=())
    suite = replace(suite, kv_figure="")
    run = suites.run_suite(controller, tokenizer, suite, n=2, policy=AllSparse())
    figures = {figure.name: figure for figure in run.figures}
    assert figures["continuation_4k_sparsity"].value == 1.0
    ours, theirs = ([r.nll for cell in cells.values() for r in cell] for cells in (run.routed, run.dense))
    assert figures["continuation_4k_nll_vs_dense"].value == pytest.approx(sum(ours) / sum(theirs))
    assert figures["continuation_4k_nll_vs_dense"].n == 6
    assert len(run.details()["samples"]) == 6


def test_free_wording_is_told_by_class(controller, tokenizer):
    suite = replace(suites.get_suite("free"), lengths=(900,))
    run = suites.run_suite(controller, tokenizer, suite, n=2, policy=AllSparse())
    found = {figure.name: figure for figure in run.figures}
    wanted = {f"free_{task}_0k_{what}" for task in ("question", "request") for what in ("sparsity", "nll_vs_dense")}
    assert wanted <= set(found)
    assert found["free_question_0k_sparsity"].value == 1 and found["free_question_0k_sparsity"].n == 2
    generated = suites.run_suite(
        controller, tokenizer, suite, n=2, policy=AllSparse(), options=RunOptions(scoring="generated")
    )
    found = {figure.name: figure for figure in generated.figures}
    assert found["free_question_0k_f1_dense"].unit == "share" and "free_request_0k_nll_vs_dense" in found


def test_unknown_suite_and_too_few_samples(controller, tokenizer):
    with pytest.raises(ValueError, match=r"unknown suite 'x'; known: needle"):
        suites.get_suite("x")
    with pytest.raises(ValueError, match="at least 2"):
        suites.run_suite(controller, tokenizer, suites.get_suite("quick"), n=1)


# ---------------------------------------------------------------------------------------------------- results files


def test_results_are_written_whole_and_read_back(tmp_path):
    figures = [Figure.of("a_b", Estimate(0.5, 0.4, 0.6, 10), "ratio"), Figure("c", 3.0, "s", repetitions=(3.0, 3.5))]
    path = results.write_results("unit", figures, device="cpu", settings={"seed": 1}, folder=tmp_path)
    data = json.loads(path.read_text())
    assert {"device", "torch", "transformers", "python", "commit", "date", "settings"} <= set(data)
    assert data["figures"][0] == {"name": "a_b", "value": 0.5, "unit": "ratio", "n": 10, "low": 0.4, "high": 0.6}
    assert data["figures"][1]["repetitions"] == [3.0, 3.5]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    found = results.read_results(tmp_path)
    assert found["a_b"]["value"] == 0.5 and found["a_b"]["source"] == path.name


def test_the_newest_figure_counts(tmp_path):
    for name, date, value in (("x", "2025-01-01T00:00:00+00:00", 1.0), ("y", "2026-01-01T00:00:00+00:00", 2.0)):
        figure = {"name": "f", "value": value, "unit": "s"}
        data = {"device": "d", "commit": "c", "date": date, "figures": [figure]}
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    assert results.read_results(tmp_path)["f"]["value"] == 2.0
    (tmp_path / "z.json").write_text("{}")
    with pytest.raises(ValueError, match=r"z\.json is no results file"):
        results.read_results(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = results.write_results("unit", [Figure("a", 1.0, "s")], device="cpu", settings={}, folder=tmp_path)
    before = path.read_text()
    with pytest.raises((TypeError, ValueError)):
        results.write_results("unit", [Figure("a", 2.0, "s")], device="cpu", settings={"x": object()}, folder=tmp_path)
    assert path.read_text() == before


def test_figures_are_checked(tmp_path):
    with pytest.raises(ValueError, match="finite"):
        Figure("a", math.nan, "s")
    with pytest.raises(ValueError, match="lower case"):
        Figure("A b", 1.0, "s")
    with pytest.raises(ValueError, match="each name once"):
        results.write_results("unit", [Figure("a", 1.0, "s")] * 2, device="cpu", settings={}, folder=tmp_path)


def test_commit_outside_of_a_checkout_is_unknown(tmp_path):
    assert results.commit_id(tmp_path) == results.UNKNOWN_COMMIT
