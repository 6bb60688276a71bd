import pytest

pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")

from gnpractical.tv.comparison import TorchvisionRows

QUICK = ["--quick", "--lr", "0.01", "--min-size", "64"]


def test_settings_are_what_the_result_depends_on():
    rows = TorchvisionRows(QUICK)
    assert rows.iterations == 1000
    same = TorchvisionRows(["--min-size=64", "--workers", "3", "--device", "cpu", *QUICK[:3]])
    assert same.settings("GN_1", 2) == rows.settings("GN_1", 2)
    other = [TorchvisionRows([*QUICK, "--batch-size", "1"]).settings("GN_1", 2)]
    other += [rows.settings("GN_2", 2), rows.settings("GN_1", 3)]
    assert rows.settings("GN_1", 2) not in other


def test_a_norm_that_does_not_fit_is_found_before_training():
    rows = TorchvisionRows([*QUICK, "--iterations=8"])
    assert rows.iterations == 8
    rows.check("GN_4")
    with pytest.raises(ValueError, match="GN_48"):
        rows.check("GN_48")
