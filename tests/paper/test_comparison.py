from gnpractical.paper.comparison import mean_and_spread, significant_differences


def test_differences_beyond_the_noise():
    samples = {"32": [50.0, 51.0, 49.0], "1": [50.5, 49.5, 51.0], "practical": [60.0, 61.0, 60.5]}
    expected = "practical over 32 by 10.50 (p 0.000); practical over 1 by 10.17 (p 0.000)"
    assert significant_differences(samples) == expected


def test_noise_is_no_difference():
    assert significant_differences({"a": [1.0, 5.0, 3.0], "b": [2.0, 6.0, 4.0]}) == "none"


def test_too_little_to_say():
    assert significant_differences({"a": [1.0], "b": [9.0]}) == "none"
    assert significant_differences({"a": [1.0, 2.0], "b": [9.0]}) == "none"
    assert significant_differences({"a": [1.0, 1.1], "b": [9.0, float("nan")]}) == "none"
    assert significant_differences({"a": [1.0, 1.0], "b": [2.0, 2.0]}) == "none"  # no spread


def test_mean_and_spread():
    assert mean_and_spread([1.0, 2.0, 3.0]) == "2.00 +- 1.00"
    assert mean_and_spread([1.234], 1) == "1.2"
    assert mean_and_spread([]) == "-"
    assert mean_and_spread([1.0, float("nan")]) == "nan"
