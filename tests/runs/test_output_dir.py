import multiprocessing
import os
import shutil
from collections import namedtuple

import pytest
from torch import nn

from gnpractical.runs.output_dir import (
    check_disk_space,
    check_output_dir,
    claim_output_dir,
    write_atomically,
    write_text,
)


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


def hold(folder, ready, done):
    claim_output_dir(folder, "--output-dir")
    (folder / "model.pth.abc.part").write_text("of another")
    ready.set()
    done.wait(60)


def test_a_folder_has_one_run_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(OSError, match=rf"--output-dir .* is in use by process {other.pid} on"):
        claim_output_dir(tmp_path, "--output-dir")
    other.kill()  # and not: let it end
    other.join(60)
    claim_output_dir(tmp_path, "--output-dir")
    claim_output_dir(tmp_path, "--output-dir")  # the same process again
    assert not list(tmp_path.glob("*.part"))


def write_often(path, text):
    for _ in range(250):
        write_text(path, text * 1000)


def test_concurrent_writes_leave_whole_files(tmp_path):
    path = tmp_path / "x.json"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_often, args=(path, t)) for t in "abcd"]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if path.exists():
            assert path.read_text() in {t * 1000 for t in "abcd"}
    assert all(process.exitcode == 0 for process in processes)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_files_have_the_usual_permissions(tmp_path):
    write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_an_error_of_torch_save_names_the_file_and_the_space(tmp_path):
    def write(file):
        raise RuntimeError("unexpected pos 64 vs 0")  # as on a full disk

    with pytest.raises(OSError, match=r"x.pth cannot be written \(unexpected pos .* MiB are free"):
        write_atomically(tmp_path / "x.pth", write)
    assert not list(tmp_path.iterdir())
