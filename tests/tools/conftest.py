import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.forked_tool import ONE_STEP, forked

ROOT = Path(__file__).parents[2]


@pytest.fixture
def error_of(monkeypatch):
    """A function (tool, *args) -> its last line. In this process: a new one takes seconds."""

    def run(tool, *args):
        monkeypatch.setattr(sys, "argv", [str(tool), *map(str, args)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.chdir(ROOT)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
        assert isinstance(stop.value.code, str) and stop.value.code.startswith("error: ")
        assert len(stop.value.code.splitlines()) == 1
        return stop.value.code

    return run


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Environment of a tool's process, with a few gnp_shapes images and no GPU."""
    from gnpractical.datasets.shapes import make_shapes

    root = tmp_path_factory.mktemp("datasets")
    make_shapes(root, {"train": 8, "val": 4})
    return os.environ | {
        "DETECTRON2_DATASETS": str(root),
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.fixture
def kill_after():
    """A function (command, environment, path): runs the command, and kills it once ``path`` is."""

    def run(command, environment, path):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.time() + 120
        while not path.exists():
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()

    return run


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A data set of a few shapes, and a folder of two classes of images."""
    from PIL import Image

    from gnpractical.datasets.shapes import make_shapes

    root = tmp_path_factory.mktemp("bad")
    make_shapes(root / "data", {"train": 4, "val": 2})
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (root / "classes" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(root / "classes" / name / "0.png")
    return {"root": ROOT, "classes": root / "classes", "data": root / "data"}


@pytest.fixture
def refused(places, tmp_path):
    """A function (tool, options) -> the one line with which the tool ends."""

    def run(tool, options, data=None):
        if "net" in tool or "{root}/configs" in options:
            pytest.importorskip("detectron2", reason="Detectron2 is not installed")
        words = [w.format(**places, out=tmp_path / "out") for w in options.split()]
        code, text = forked(tool, words, data or places["data"], tmp_path)
        assert code in (1, 2) and "Traceback" not in text, text[-3000:]
        line = text.splitlines()[-1]
        assert "error: " in line, text[-3000:]
        return line

    return run


@pytest.fixture(scope="module", params=["train_torchvision.py", "train_net.py"])
def run_folder(request, places, tmp_path_factory):
    """What a trainer leaves after an iteration and an evaluation."""
    tool = request.param
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    if tool == "train_net.py":
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    folder = tmp_path_factory.mktemp("run")
    words = ONE_STEP[tool].format(**places, out=folder / "out").split()
    code, text = forked(tool, words, places["data"], folder)
    assert code == 0, text[-3000:]
    return folder / "out"
