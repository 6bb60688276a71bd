import pytest

from gnpractical.analysis.comparison import mean_and_spread, significant_differences


def test_differences_beyond_the_noise():
    samples = {"32": [50.0, 51.0, 49.0], "1": [50.5, 49.5, 51.0], "practical": [60.0, 61.0, 60.5]}
    found = significant_differences(samples)
    assert [(d.higher, d.lower) for d in found] == [("practical", "32"), ("practical", "1")]
    assert found[0].difference == pytest.approx(10.5) and found[0].p_value < 0.05


def test_noise_is_no_difference():
    assert significant_differences({"a": [1.0, 5.0, 3.0], "b": [2.0, 6.0, 4.0]}) == []


def test_too_little_to_say():
    assert significant_differences({"a": [1.0], "b": [9.0]}) == []
    assert significant_differences({"a": [1.0, 2.0], "b": [9.0]}) == []
    assert significant_differences({"a": [1.0, 1.1], "b": [9.0, float("nan")]}) == []


def test_no_spread_at_all():
    found = significant_differences({"a": [1.0, 1.0], "b": [2.0, 2.0], "c": [1.0, 1.0]})
    assert [(d.higher, d.lower, d.difference) for d in found] == [("b", "a", 1), ("b", "c", 1)]


def test_mean_and_spread():
    assert mean_and_spread([1.0, 2.0, 3.0]) == "2.00 +- 1.00"
    assert mean_and_spread([1.234], 1) == "1.2"
    assert mean_and_spread([]) == "-"
    assert mean_and_spread([1.0, float("nan")]) == "nan"
