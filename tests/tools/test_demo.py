import json
import subprocess
import sys

import pytest
from filelock import FileLock

from gnpractical import demo

# Runs the demo where the modules before "--" cannot be imported, and says which were.
SCRIPT = """
import runpy, sys
end = sys.argv.index("--")
sys.modules.update(dict.fromkeys(sys.argv[1:end]))
sys.argv[1:] = sys.argv[end + 1:]
runpy.run_module("gnpractical.demo", run_name="__main__")
print(*(m for m in ("detectron2", "gnpractical.d2", "gnpractical.tv") if sys.modules.get(m)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["Detectron2", "torchvision"])
def test_trains_with_one_framework(environment, tmp_path, framework):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    if framework == "Detectron2":
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    blocked = [] if framework == "Detectron2" else ["detectron2"]
    options = ["--iterations", "2", "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *blocked, "--", *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].endswith(f"raining a small Panoptic FPN with {framework}.")
    assert lines[-1] == ("gnpractical.tv" if blocked else "detectron2 gnpractical.d2")
    assert "PQ" in lines[-2] and lines[-2].endswith("out/inference/predictions.png")
    assert (tmp_path / "out" / "inference" / "predictions.png").is_file()
    assert json.loads((tmp_path / "out" / "groups.json").read_text())


@pytest.mark.parametrize(
    "options, blocked, expected",
    [
        (["--iterations", "0"], [], "--iterations must be at least 1, got 0"),
        (["--output-dir", "/dev/null/x"], [], "--output-dir '/dev/null/x' cannot be written"),
        ([], ["detectron2", "torchvision"], "pip install tensorboard torchvision"),
    ],
)
def test_errors_in_one_line(monkeypatch, tmp_path, options, blocked, expected):
    for module in [m for m in sys.modules if m.split(".")[0] in blocked]:
        monkeypatch.delitem(sys.modules, module)
    for module in blocked:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", ["demo", "--output-dir", str(tmp_path), *options])
    with pytest.raises(SystemExit) as stop:
        demo.main()
    assert stop.value.code.startswith("error: ") and expected in stop.value.code
    assert len(stop.value.code.splitlines()) == 1


def test_a_folder_in_use_is_left_alone(monkeypatch, tmp_path):
    folder = tmp_path.resolve()
    lock = FileLock(folder / ".lock")
    with lock:
        (folder / ".lock").write_text("process 1 on elsewhere")
        monkeypatch.setattr(sys, "argv", ["demo", "--output-dir", str(tmp_path)])
        with pytest.raises(SystemExit) as stop:
            demo.main()
    assert "is in use by process 1 on elsewhere" in stop.value.code
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
