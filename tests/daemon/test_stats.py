"""Histograms count like Prometheus does, and everything with a label is there from the start."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurd.errors import Code
from recurd.stats import LATENCY_BOUNDS, ROW_BOUNDS, Histogram, ModelStats, Stats


def test_a_value_equal_to_a_bound_belongs_to_it() -> None:
    histogram = Histogram((1, 2, 4))

    for value in (1, 1.5, 2, 4, 4.1):
        histogram.observe(value)

    assert histogram.cumulative() == [1, 3, 4, 5]
    assert histogram.count == 5
    assert histogram.sum == pytest.approx(12.6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 2, width=32)))
def test_many_values_at_once_count_like_one_by_one(values: list[float]) -> None:
    one_by_one, at_once = Histogram(LATENCY_BOUNDS), Histogram(LATENCY_BOUNDS)

    for value in values:
        one_by_one.observe(value)
    at_once.observe_many(np.array(values, np.float64))

    assert at_once.cumulative() == one_by_one.cumulative()
    assert at_once.sum == pytest.approx(one_by_one.sum)


def test_an_array_of_integers_of_any_shape_is_counted() -> None:
    histogram = Histogram(ROW_BOUNDS)

    histogram.observe_many(np.array([[1, 3], [64, 5000]], np.int32))

    assert histogram.count == 4
    assert histogram.counts[-1] == 1
    assert histogram.sum == 5068


def test_every_code_can_be_counted_by_itself() -> None:
    stats = Stats()

    for code in Code:
        stats.refused[code] += 1
        stats.broken[code] += 1

    assert sum(stats.refused) == sum(stats.broken) == len(Code)


def test_a_model_is_added_once_and_counts_through_what_is_returned() -> None:
    stats = Stats()

    pump = stats.add_model("pump", slots=8)
    pump.ticks += 1

    assert isinstance(stats.models["pump"], ModelStats)
    assert stats.models["pump"].ticks == 1
    assert stats.models["pump"].slots == 8
