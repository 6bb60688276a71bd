import math

import pytest

from gnpractical.gradient_law import gradient_variance_ratio


def test_ratio_is_eq_31():
    assert gradient_variance_ratio(128, 128, 1) == 1.03125
    assert gradient_variance_ratio(128, 128, 32) == 2.0
    assert gradient_variance_ratio(784, 512, 64) == pytest.approx(768 / 784)


def test_ratio_of_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="48 groups do not divide 256 channels.*1, 2, 4"):
        gradient_variance_ratio(64, 256, 48)


def test_exact_law():
    assert gradient_variance_ratio(512, 256, 64, law="exact") == 1.0
    assert gradient_variance_ratio(512, 256, 32, law="exact") == pytest.approx(0.6)
    assert gradient_variance_ratio(6, 6, 1, law="exact") == pytest.approx(4 / 3)
    assert gradient_variance_ratio(6, 6, 2, law="exact") == math.inf
    with pytest.raises(ValueError, match="law must be one of 'paper', 'exact'; got 'true'"):
        gradient_variance_ratio(6, 6, 2, law="true")
