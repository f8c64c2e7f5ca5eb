"""Schedules are functions of the step alone."""

import pytest

from flux_attention.training.schedules import temperature, warmup, warmup_cosine


def test_temperature_falls_over_its_share_and_stays():
    values = [temperature(step, 100) for step in range(101)]
    assert values[0] == 1.5
    assert values[30] == pytest.approx(1.25)
    assert values[60:] == [1.0] * 41
    assert values == sorted(values, reverse=True)


def test_temperature_without_a_share_is_the_end():
    assert temperature(0, 10, start=3.0, end=0.5, share=0.0) == 0.5


def test_warmup_never_starts_at_zero_and_holds():
    values = [warmup(step, 100) for step in range(100)]
    assert values[0] == pytest.approx(1 / 20)
    assert values[19:] == [1.0] * 81
    assert warmup(0, 1) == 1.0
    assert warmup(0, 5, share=0.0) == 1.0


def test_warmup_cosine_peaks_once_and_ends_at_zero():
    values = [warmup_cosine(step, 50) for step in range(51)]
    peak = values.index(max(values))
    assert max(values) == pytest.approx(1.0, abs=2e-3)
    assert values[:peak] == sorted(values[:peak])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert values[50] == pytest.approx(0.0)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_out_of_range_is_refused(share):
    for schedule in (temperature, warmup, warmup_cosine):
        with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
            schedule(5, 10, share=share)
