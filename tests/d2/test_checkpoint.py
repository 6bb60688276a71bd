import io
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.layers import Conv2d, get_norm
from torch import nn

from gnpractical.d2.checkpoint import GNPCheckpointer
from gnpractical.d2.trainer import Trainer
from gnpractical.layers.weight_standardization import apply_weight_standardization
from gnpractical.runs.array_pickle import load_arrays
from gnpractical.runs.group_record import RECORD_KEY, GroupMismatch, group_record


class Model(nn.Module):
    """Paths as in Detectron2's models, so that the advice can name config keys."""

    def __init__(self, backbone="GN_PRACTICAL", head="GN_PRACTICAL"):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.bottom_up = nn.Sequential(
            Conv2d(8, 16, 1, norm=get_norm(backbone, 16)),
            Conv2d(64, 16, 1, norm=get_norm(backbone, 16)),
        )
        self.sem_seg_head = Conv2d(16, 8, 1, norm=get_norm(head, 8))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_round_trip_keeps_weights_extra_data_and_the_record(tmp_path):
    model = Model()
    GNPCheckpointer(model, str(tmp_path)).save("model_0", iteration=7)
    other = Model()
    rest = GNPCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == 7 and same(model, other)
    record = torch.load(tmp_path / "model_0.pth", weights_only=True)[RECORD_KEY]
    assert record == group_record(model)
    assert record["backbone.bottom_up.1.norm"] == {
        "num_groups": 16,
        "norm": "GN_PRACTICAL",
        "weight_standardized": False,
    }


def test_detectron2s_own_checkpointer_reads_it(tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer

    model, other = Model(), Model()
    GNPCheckpointer(model, str(tmp_path)).save("model_0")
    DetectionCheckpointer(other).load(str(tmp_path / "model_0.pth"))
    assert same(model, other)


def test_other_counts_stop_with_layers_and_override(tmp_path):
    GNPCheckpointer(Model("GN_4"), str(tmp_path)).save("model_0")
    model = Model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(GroupMismatch) as e:
        GNPCheckpointer(model).load(str(tmp_path / "model_0.pth"))
    for part in [
        "model_0.pth",
        "2 of 3",
        "backbone.bottom_up.0.norm: G=4 in the file, G=1 in the",
        "MODEL.RESNETS.NORM GN_4",
        "MODEL.GNP.CHECKPOINT_MISMATCH warn",
    ]:
        assert part in str(e.value)
    assert "SEM_SEG_HEAD" not in str(e.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_override_it_names_matches(tmp_path):
    for backbone, head in [("GN_4", "GN_8"), ("GN_CLOSEST", "GN_PRACTICAL")]:
        GNPCheckpointer(Model(backbone, head), str(tmp_path)).save("model_0")
        model = Model("GN_2", "GN_1")
        with pytest.raises(GroupMismatch) as e:
            GNPCheckpointer(model).load(str(tmp_path / "model_0.pth"))
        assert f"MODEL.RESNETS.NORM {backbone}, MODEL.SEM_SEG_HEAD.NORM {head}" in str(e.value)
        GNPCheckpointer(Model(backbone, head)).load(str(tmp_path / "model_0.pth"))


def test_mismatch_warns_or_is_ignored(tmp_path, caplog):
    saved = Model("GN_4")
    GNPCheckpointer(saved, str(tmp_path)).save("model_0")
    for mode, says in [("warn", True), ("ignore", False)]:
        caplog.clear()
        model = Model()
        GNPCheckpointer(model, mismatch=mode).load(str(tmp_path / "model_0.pth"))
        assert same(model, saved)
        assert ("MODEL.RESNETS.NORM GN_4" in caplog.text) == says


def test_weight_standardization_is_compared_too(tmp_path):
    model = Model()
    apply_weight_standardization(model, ["backbone"])
    GNPCheckpointer(model, str(tmp_path)).save("model_0")
    with pytest.raises(GroupMismatch, match="'backbone' in MODEL.GNP.WEIGHT_STANDARDIZATION"):
        GNPCheckpointer(Model()).load(str(tmp_path / "model_0.pth"))


def test_other_norms_are_recorded_and_compared_too(tmp_path):
    model = Model("BN")
    apply_weight_standardization(model, ["backbone"])
    GNPCheckpointer(model, str(tmp_path)).save("model_0")
    checkpointer = GNPCheckpointer(Model())
    with pytest.raises(GroupMismatch, match="backbone.* BatchNorm2d with weight.*NORM BN") as e:
        checkpointer.load(str(tmp_path / "model_0.pth"))
    assert "BatchNorm2d" not in str(e.value).partition("To match")[2]
    with pytest.raises(GroupMismatch):  # and the same again
        checkpointer.load(str(tmp_path / "model_0.pth"))
    with pytest.raises(GroupMismatch, match="'backbone' in"):
        GNPCheckpointer(Model("BN")).load(str(tmp_path / "model_0.pth"))


def test_weights_without_record_are_said_to_be_of_unknown_counts(tmp_path, caplog):
    path = tmp_path / "plain.pth"
    torch.save({"model": Model().state_dict()}, path)
    GNPCheckpointer(Model()).load(str(path))
    lines = [r.getMessage() for r in caplog.records if "unknown number of groups" in r.getMessage()]
    assert len(lines) == 1 and "model zoos: 32" in lines[0] and "3 GroupNorm" in lines[0]


def test_model_zoo_pickle_of_arrays_loads(tmp_path, caplog):
    saved = Model()
    path = tmp_path / "R-50-GN.pkl"
    arrays = {k: v.numpy() for k, v in saved.state_dict().items()}
    for protocol in (2, 4, 5):
        with open(path, "wb") as f:
            pickle.dump(
                {"model": arrays, "__author__": "zoo", "matching_heuristics": True},
                f,
                protocol=protocol,
            )
        model = Model()
        GNPCheckpointer(model).load(str(path))
        assert same(model, saved)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth", "evil.pyth"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, name):
    victim = tmp_path / "ran"
    content = {"model": {"x": Evil(victim)}, "model_state": {}, "__author__": "me"}
    if name.endswith("pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is no checkpoint that can be loaded"):
        GNPCheckpointer(Model()).load(str(tmp_path / name))
    assert not victim.exists()


@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_truncated_and_foreign_files_are_named(tmp_path, name, content):
    path = tmp_path / name
    if content is None:
        torch.save({"model": Model().state_dict()}, path)
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    model = Model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=name):
        GNPCheckpointer(model).load(str(path))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no.pth' does not exist"):
        GNPCheckpointer(Model()).load(str(tmp_path / "no.pth"))


def test_arrays_of_every_protocol_kind_and_order(tmp_path):
    arrays = {
        "f4": np.arange(6, dtype="f4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big-endian": np.arange(3, dtype=">f8"),
        "empty": np.zeros((0, 3), "f2"),
        "ints": np.arange(4),
        "scalar": np.float32(3),
        "plain": [1, "two", (3.0, None)],
    }
    for protocol in range(6):
        loaded = load_arrays(io.BytesIO(pickle.dumps(arrays, protocol=protocol)))
        assert loaded.keys() == arrays.keys() and loaded["plain"] == arrays["plain"]
        for key in arrays.keys() - {"plain"}:
            np.testing.assert_array_equal(loaded[key], arrays[key])
            assert np.shape(loaded[key]) == np.shape(arrays[key])


def test_arrays_of_objects_are_refused():
    with pytest.raises(pickle.UnpicklingError, match="not of numbers"):
        load_arrays(io.BytesIO(pickle.dumps(np.array([{}, 1], dtype=object))))

    # A dtype turned into one of pointers after the array was made: memory corruption in numpy.
    class Turned:
        def __reduce__(self):
            state = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 27)
            return np.dtype, ("V8", False, True), state

    with pytest.raises(pickle.UnpicklingError, match="not of numbers"):
        load_arrays(io.BytesIO(pickle.dumps(Turned())))


def test_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"model": nn.Linear(3, 3).state_dict()}, path)
    with pytest.raises(ValueError, match="other.pth: none of the model's 12 parameters"):
        GNPCheckpointer(Model()).load(str(path))
    torch.save({"model": 3}, path)
    with pytest.raises(ValueError, match="other.pth is no checkpoint that can be loaded"):
        GNPCheckpointer(Model()).load(str(path))


def test_disk_full_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch):
    model = Model()
    checkpointer = GNPCheckpointer(model, str(tmp_path))
    checkpointer.save("model_final")
    before = (tmp_path / "model_final.pth").read_bytes()

    def full(data, f):
        f.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="model_final.pth could not be written.*last good checkpoint"):
        checkpointer.save("model_final")
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_final.pth"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = Model()
    checkpointer = GNPCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0")
    with torch.no_grad():
        model.sem_seg_head.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="sem_seg_head.weight.*model_0.pth"):
        checkpointer.save("model_1")
    assert checkpointer.get_checkpoint_file().endswith("model_0.pth")
    assert not (tmp_path / "model_1.pth").exists()


def test_other_shapes_are_logged_as_detectron2_does(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    state = Model().state_dict()
    state["sem_seg_head.weight"] = torch.zeros(3)
    torch.save({"model": state}, tmp_path / "a.pth")
    GNPCheckpointer(Model()).load(str(tmp_path / "a.pth"))
    assert "sem_seg_head.weight" in caplog.text


def test_numpy_scalars_are_admitted(tmp_path):
    state = {k: v.numpy() for k, v in Model().state_dict().items()}
    data = {"model": state, "__author__": "zoo", "epoch": np.float32(3)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(data))
    GNPCheckpointer(Model()).load(str(tmp_path / "a.pkl"))


def test_detectron2s_options_behind_a_question_mark(tmp_path):
    saved, other = Model(), Model()
    weights = {key.removeprefix("backbone."): v for key, v in saved.state_dict().items()}
    torch.save(weights, tmp_path / "renamed.pth")
    GNPCheckpointer(other).load(f"{tmp_path}/renamed.pth?matching_heuristics=True")
    assert same(saved, other)
    with pytest.raises(ValueError, match="query"):
        GNPCheckpointer(other).load(f"{tmp_path}/renamed.pth?matching=True")


def test_nothing_is_scored_that_was_not_loaded(tiny_cfg, tmp_path):
    with pytest.raises(ValueError, match="nothing to evaluate: MODEL.WEIGHTS is empty$"):
        Trainer.evaluate(tiny_cfg(), resume=False)
    with pytest.raises(ValueError, match="is empty, and there is no checkpoint in"):
        Trainer.evaluate(tiny_cfg(), resume=True)
    model = Trainer.build_model(tiny_cfg())
    part = {k: v for k, v in model.state_dict().items() if not k.startswith("roi_heads.")}
    torch.save({"model": part}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="of another model: .* missing .*first roi_heads"):
        Trainer.evaluate(tiny_cfg("MODEL.WEIGHTS", str(tmp_path / "part.pth")), resume=False)
