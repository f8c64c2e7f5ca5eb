"""Scores against values worked out by hand; intervals against what they promise."""

import numpy as np
import pytest

from flux_attention.evaluation import metrics


def test_string_match():
    assert metrics.string_match_all(" 123, 456 and 7", ["123", "456", "999", "7"]) == 0.75
    assert metrics.string_match_part("it is Oslo.", ["Rome", "oslo"]) == 1.0
    assert metrics.string_match_part("none", ["Rome"]) == 0.0


def test_exact_match_wants_the_answer_first_and_whole():
    assert metrics.exact_match(" 123.\nBecause", ["123"]) == 1.0
    assert metrics.exact_match("The 123 of it", ["123"]) == 1.0
    assert metrics.exact_match("1234", ["123"]) == 0.0
    assert metrics.exact_match("maybe 123", ["123"]) == 0.0
    assert metrics.exact_match("", ["123"]) == 0.0


def test_f1():
    # Three words each, two in common.
    assert metrics.f1("red green blue", ["green blue gray"]) == pytest.approx(2 / 3)
    assert metrics.f1("the red", ["red", "blue"]) == 1.0
    assert metrics.f1("x", ["y"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("so\n#### 1,234", 1.0), ("so it is 1234.", 1.0), ("#### 12\n#### 1234", 0.0), ("none", 0.0)],
)
def test_number_match(prediction, expected):
    assert metrics.number_match(prediction, ["1234"]) == expected


def test_number_match_stops_at_the_next_question():
    assert metrics.number_match("It is 5.\n\nQuestion: and 6?", ["5"]) == 1.0


def test_boxed_match():
    assert metrics.boxed_match(r"so \boxed{\dfrac{1}{2}} it is", [r"\frac{1}{2}"]) == 1.0
    assert metrics.boxed_match(r"\boxed{ \left(3, 4\right) }", ["(3,4)"]) == 1.0
    assert metrics.boxed_match(r"\boxed{2", ["2"]) == 0.0
    assert metrics.boxed_match("2", ["2"]) == 0.0


def test_score_dispatch_and_errors():
    assert metrics.score("f1", "a b", ["a b"]) == 1.0
    with pytest.raises(ValueError, match="nll needs logits"):
        metrics.score("nll", "x", ["x"])
    with pytest.raises(ValueError, match="answers must be"):
        metrics.score("f1", "x", "x")


def test_span_accuracy():
    assert metrics.span_accuracy([True, True, False, True], [(0, 2), (2, 4)]) == 0.5
    with pytest.raises(ValueError, match="spans"):
        metrics.span_accuracy([True], [])


def test_wilson_against_published_values():
    # Newcombe (1998), table I: 81 of 263, and 0 of 20.
    found = metrics.wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    found = metrics.wilson(0, 20)
    assert (found.low, round(found.high, 4)) == (0.0, 0.1611)
    found = metrics.wilson(20, 20)
    assert found.value == found.high == 1.0
    with pytest.raises(ValueError, match="successes"):
        metrics.wilson(3, 2)


def test_bootstrap_is_repeatable_and_covers():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        values = rng.random(60)
        found = metrics.bootstrap_mean(values, seed=trial, resamples=400)
        hits += found.low <= 0.5 <= found.high
    assert 0.88 <= hits / 200 <= 0.99
    assert metrics.bootstrap_mean([0, 1, 1], seed=1) == metrics.bootstrap_mean([0, 1, 1], seed=1)
    assert metrics.bootstrap_mean([0, 1, 1], seed=1).n == 3


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(1)
    second = rng.random(100)
    first = second + 0.01 + 0.001 * rng.random(100)
    found = metrics.macro_difference({"a": first}, {"a": second})
    assert found.low > 0.0
    assert found.high - found.low < 0.001
    ratio = metrics.paired_ratio(2 * second, second)
    assert ratio.value == ratio.low == ratio.high == 2.0


def test_macro_weighs_tasks_alike():
    scores = {"a": [1.0] * 30, "b": [0.0, 0.0]}
    assert metrics.macro_mean(scores).value == 0.5
    reordered = {"b": [0.0, 0.5, 1.0], "a": [1.0, 0.0]}
    assert metrics.macro_mean(reordered) == metrics.macro_mean(dict(reversed(reordered.items())))
    found = metrics.macro_difference({"a": [1, 1], "b": [1, 0]}, {"a": [0, 1], "b": [1, 0]})
    assert found.value == pytest.approx(0.25)
    assert metrics.macro_ratio({"a": [1, 1]}, {"a": [0.5, 0.5]}).value == 2.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.bootstrap_mean([1.0]), "at least 2"),
        (lambda: metrics.bootstrap_mean([1.0, float("nan")]), "not finite"),
        (lambda: metrics.bootstrap_mean([1.0, 2.0], confidence=1.0), "confidence"),
        (lambda: metrics.paired_ratio([1.0, 2.0], [1.0, 2.0, 3.0]), "same samples"),
        (lambda: metrics.macro_difference({"a": [1, 2]}, {"b": [1, 2]}), "same tasks"),
        (lambda: metrics.macro_ratio({"a": [1, 2]}, {"a": [0, 0]}), "ratio"),
        (lambda: metrics.macro_mean({}), "at least one task"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_samples_of_one_document_are_drawn_together():
    rng = np.random.default_rng(0)
    # Twenty documents of ten samples each, which differ by document alone.
    level = np.repeat(rng.normal(2, 0.5, 20), 10)
    ones, documents = np.ones(200), np.repeat(np.arange(20), 10).tolist()
    found, naive = metrics.clustered_mean(level, documents), metrics.bootstrap_mean(level)
    assert found.value == pytest.approx(level.mean()) and found.n == 200
    width, narrow = found.high - found.low, naive.high - naive.low
    # As wide as for the twenty values that there are.
    of_means = metrics.bootstrap_mean(level[::10])
    assert width == pytest.approx(of_means.high - of_means.low, rel=0.05) and width > 2.5 * narrow
    # Documents of different sizes: the mean is the samples'.
    assert metrics.clustered_mean([1, 1, 1, 5], list("aaab")).value == pytest.approx(2)
    assert metrics.clustered_ratio(level, ones, list(range(200))) == metrics.paired_ratio(level, ones)
    assert metrics.clustered_mean([1, 2, 3], list("aaa")) == metrics.paired_ratio([1, 2, 3], np.ones(3))
    with pytest.raises(ValueError, match="one cluster"):
        metrics.clustered_ratio(level, ones, documents[:-1])
