"""Wrong checkpoints, which both trainers refuse to evaluate and to go on from."""

import math
import pickle

import pytest
import torch
from helpers.forked_tool import ONE_STEP, forked

pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def edit(**changes):
    """A change of what a checkpoint holds."""
    return lambda saved: saved | changes


def weights(change):
    """A change of every weight in a checkpoint."""
    return lambda saved: saved | {"model": {k: change(v) for k, v in saved["model"].items()}}


CHECKPOINTS = {
    "nothing": b"",
    "text": b"no checkpoint",
    "a list": lambda saved: [1, 2],
    "a number": lambda saved: 7,
    "no weights": edit(model={}),
    "weights null": edit(model=None),
    "weights list": edit(model=[1]),
    "weights text": weights(lambda w: "text"),
    "one weight less": lambda saved: saved | {"model": dict(list(saved["model"].items())[1:])},
    "integers": weights(lambda w: w.long()),
    "complex": weights(lambda w: w.to(torch.complex64)),
    "nan": weights(lambda w: w * math.nan),
    "infinite": weights(lambda w: w + math.inf),
    "flat": weights(lambda w: w.flatten()[:1]),
    "larger": weights(lambda w: torch.stack([w, w])),
    "records list": edit(gnp_groups=[1]),
    "records null": edit(gnp_groups={"backbone": None}),
    "classes list": edit(gnp_classes=[1]),
    "classes number": edit(gnp_classes={"things": {1: 2}}),
    "other things": edit(gnp_classes={"things": {1: "cat"}}),
    "other stuff": edit(gnp_classes={"stuff": {5: "sky"}}),
    "iteration text": edit(iteration="many"),
    "iteration -5": edit(iteration=-5),
    "iteration nan": edit(iteration=math.nan),
}


@pytest.fixture(scope="module", params=["train_torchvision.py", "train_net.py"])
def trained(request, places, tmp_path_factory):
    """A tool, how it evaluates a file, and how it goes on from it, after an iteration of it."""
    tool = request.param
    if "net" in tool:
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    folder = tmp_path_factory.mktemp("trained")
    words = ONE_STEP[tool].format(**places, out=folder / "out").split()
    code, text = forked(tool, words, places["data"], folder)
    assert code == 0, text[-3000:]
    evaluate = {"net": "--eval-only {} MODEL.WEIGHTS {}", "torch": "{} --test-only --weights {}"}
    go_on = {"net": "--resume {} SOLVER.MAX_ITER 2", "torch": "{} --resume --iterations 2"}
    kind = "net" if "net" in tool else "torch"
    return tool, folder / "out" / "model_final.pth", evaluate[kind], go_on[kind]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CHECKPOINTS, "cut", "flipped", "code"])
@pytest.mark.parametrize("use", ["evaluate", "go on"])
def test_checkpoints(refused, trained, tmp_path, name, use):
    tool, sound, evaluate, go_on = trained
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "bad.pth"
    change = CHECKPOINTS.get(name)
    if callable(change):
        torch.save(change(torch.load(sound, weights_only=True)), path)
    elif name == "code":
        path.write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    else:
        content = bytearray(sound.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes({"cut": content[:-999], "flipped": content}.get(name, change))
    (tmp_path / "out" / "last_checkpoint").write_text("bad.pth")
    options = ONE_STEP[tool]
    options = evaluate.format(options, path) if use == "evaluate" else go_on.format(options)
    assert "bad.pth" in refused(tool, options)
    assert not (tmp_path / "ran").exists()


class Runs:
    """What makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))
