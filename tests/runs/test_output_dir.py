import os
import shutil
from collections import namedtuple

import pytest
from torch import nn

from gnpractical.runs.output_dir import check_disk_space, check_output_dir, write_text


def test_output_dir(tmp_path):
    check_output_dir(str(tmp_path / "a" / "b"), "OUTPUT_DIR")
    assert (tmp_path / "a" / "b").is_dir() and not os.listdir(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="OUTPUT_DIR .*file/x.* cannot be written"):
        check_output_dir(str(tmp_path / "file" / "x"), "OUTPUT_DIR")


def test_disk_space(tmp_path, monkeypatch, caplog):
    model = nn.Linear(1024, 1024)  # 8 MiB with momentum
    usage = namedtuple("usage", "free")
    for free, outcome in [(2**20 * 10, "error"), (2**20 * 40, "warning"), (2**20 * 100, "")]:
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(free))
        caplog.clear()
        if outcome == "error":
            with pytest.raises(OSError, match="Disk full: 10 MiB are free.*about 8 MiB"):
                check_disk_space(str(tmp_path), model, 11, "OUTPUT_DIR")
        else:
            check_disk_space(str(tmp_path), model, 11, "OUTPUT_DIR")
            assert ("will not hold every checkpoint" in caplog.text) == (outcome == "warning")


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "first")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "second")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["a.json"]
