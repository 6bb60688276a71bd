import itertools
import json

import pytest

pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")

import torch
from helpers.short_recipe import recipe

from gnpractical import group_report
from gnpractical.runs.carry_over import match_loaded
from gnpractical.runs.group_record import RECORD_KEY, GroupMismatch
from gnpractical.tv.checkpoint import TorchvisionCheckpointer
from gnpractical.tv.training import (
    TrainingRecipe,
    _lr_factor,
    _parameter_groups,
    _shuffled,
    train,
)


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def groups_of(folder):
    rows = json.loads((folder / "groups.json").read_text())
    return {row["name"]: row["num_groups"] for row in rows}


def test_a_run_leaves_checkpoints_metrics_and_groups(tiny_panoptic, dataset, tmp_path):
    model = tiny_panoptic()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, dataset, recipe(3), str(tmp_path))
    assert all((before[k] != v).any() for k, v in model.named_parameters() if v.dim() > 1)
    names = {p.name for p in tmp_path.iterdir()}
    assert {"model_0000001.pth", "model_final.pth", "last_checkpoint", "groups.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    (line,) = metrics_of(tmp_path)
    assert line["iteration"] == 2
    losses = [v for k, v in line.items() if k.startswith("loss_")]
    assert len(losses) == 6 and all(0 < v < line["total_loss"] < 20 for v in losses)
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert saved["iteration"] == 2 and len(saved[RECORD_KEY]) == len(group_report(model))


def test_a_resumed_run_goes_on_where_it_was(tiny_panoptic, dataset, tmp_path):
    train(tiny_panoptic(), dataset, recipe(2), str(tmp_path))
    other = tiny_panoptic()
    train(other, dataset, recipe(2), str(tmp_path), resume=True)  # nothing is left to do
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in saved["model"].items())
    train(other, dataset, recipe(4), str(tmp_path), resume=True)
    assert [line["iteration"] for line in metrics_of(tmp_path)] == [1, 3]
    # The optimizer's momentum and the schedule came along.
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert saved["iteration"] == 3 and saved["optimizer"]["state"]
    with pytest.raises(ValueError, match="--iterations 3 must be at least the 4 that"):
        train(other, dataset, recipe(3), str(tmp_path), resume=True)
    # Without resume it begins anew.
    train(tiny_panoptic(), dataset, recipe(1), str(tmp_path))
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 0


def test_a_stop_keeps_the_schedule_and_is_resumed(tiny_panoptic, dataset, tmp_path):
    rates = {}
    for stops in ((0,), (1, 0)):
        folder = tmp_path / str(len(stops))
        folder.mkdir()
        for stop_at in stops:
            train(tiny_panoptic(), dataset, recipe(2, stop_at=stop_at), str(folder), resume=True)
        rates[stops] = {line["iteration"]: line["lr"] for line in metrics_of(folder)}
    assert (tmp_path / "2" / "model_0000000.pth").exists()
    assert rates[1, 0].keys() == {0, 1} and rates[1, 0][1] == rates[0,][1]
    saved = torch.load(tmp_path / "2" / "model_final.pth", weights_only=True)
    assert saved["iteration"] == 1


def test_measured_counts_are_kept(tiny_panoptic, dataset, tmp_path, monkeypatch):
    model = tiny_panoptic(norm="GN_MEASURED")
    train(model, dataset, recipe(2), str(tmp_path))
    groups = groups_of(tmp_path)
    assert all(groups.values()) and len(set(groups.values())) > 1
    monkeypatch.setattr("gnpractical.runs.calibrate_measured.calibrate", None)
    train(tiny_panoptic(norm="GN_MEASURED"), dataset, recipe(3), str(tmp_path), resume=True)
    assert groups_of(tmp_path) == groups


def test_batch_norms_weights_are_matched(tiny_panoptic, dataset, tmp_path, caplog):
    caplog.set_level("INFO")
    train(tiny_panoptic(norm="BN"), dataset, recipe(1), str(tmp_path))
    path = str(tmp_path / "model_final.pth")
    model = tiny_panoptic()
    before = model.backbone.body.bn1.weight.clone()
    for name in ("kept", "matched"):
        (tmp_path / name).mkdir()
    with pytest.raises(GroupMismatch, match="BatchNorm2d, .*--match-batches 2"):
        train(model, dataset, recipe(1), str(tmp_path / "kept"), weights=path)
    assert torch.equal(model.backbone.body.bn1.weight, before)
    train(model, dataset, recipe(1, match_batches=2), str(tmp_path / "matched"), weights=path)
    assert "GroupNorms that begin with the weights of other norms" in caplog.text
    rows = json.loads((tmp_path / "matched" / "groups.json").read_text())
    assert all(row["matched_from"] == "BatchNorm2d" for row in rows if "backbone" in row["name"])
    assert not torch.equal(model.backbone.body.bn1.weight, before)


def test_other_counts_are_matched_to_what_they_gave(tiny_panoptic, dataset, tmp_path):
    torch.manual_seed(0)
    original = tiny_panoptic(norm="GN_4")
    TorchvisionCheckpointer(original, str(tmp_path)).save("four")
    model = tiny_panoptic(norm="GN_1", weight_standardization=True)
    checkpointer = TorchvisionCheckpointer(model, match=True)
    checkpointer.load(str(tmp_path / "four.pth"), checkpointables=[])
    batch = [dataset[0][0], dataset[1][0]]
    match_loaded(model, checkpointer.other_norms, [batch])
    seen = {}
    for name, net in (("four", original), ("one", model)):
        net.backbone.body.bn1.register_forward_hook(
            lambda _, args, output, name=name: seen.update({name: output.clone()})
        )
        with torch.no_grad():
            net.eval()(batch)
    for moment in (torch.mean, torch.std):
        expected, actual = (moment(seen[name], (0, 2, 3)) for name in ("four", "one"))
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_other_group_counts_are_refused(tiny_panoptic, dataset, tmp_path, caplog):
    train(tiny_panoptic(), dataset, recipe(1), str(tmp_path))
    other = tiny_panoptic(norm="GN_2", weight_standardization=True)
    with pytest.raises(GroupMismatch, match="GN_PRACTICAL, without weight standardization.*--norm"):
        train(other, dataset, recipe(2), str(tmp_path), resume=True)
    path = str(tmp_path / "model_final.pth")
    TorchvisionCheckpointer(other, mismatch="warn").load(path)
    assert "was trained with other group counts" in caplog.text


def test_a_loss_that_is_not_finite_names_the_last_checkpoint(tiny_panoptic, dataset, tmp_path):
    model = tiny_panoptic()
    train(model, dataset, recipe(1), str(tmp_path))
    before = (tmp_path / "model_final.pth").read_bytes()
    with torch.no_grad():
        model.semantic_branch.predictor.weight.fill_(3e38)
        torch.save({"model": model.state_dict()}, tmp_path / "broken.pth")
    (tmp_path / "last_checkpoint").write_text("broken.pth")
    with pytest.raises(FloatingPointError, match="at iteration 0 .*broken.pth.*--lr"):
        train(model, dataset, recipe(2), str(tmp_path), resume=True)
    assert (tmp_path / "model_final.pth").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_damaged_checkpoints_are_named(tiny_panoptic, dataset, tmp_path, content):
    path = tmp_path / "a.pth"
    if content is None:
        torch.save({"model": {"weight": torch.zeros(2)}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="a.pth"):
        train(tiny_panoptic(), dataset, recipe(1), str(tmp_path), weights=str(path))
    with pytest.raises(ValueError, match="'gone.pth' does not exist"):
        train(tiny_panoptic(), dataset, recipe(1), str(tmp_path), weights="gone.pth")


def test_bare_weights_of_other_classes_load_with_a_warning(
    tiny_panoptic, dataset, tmp_path, caplog
):
    torch.save(tiny_panoptic(num_stuff=2).state_dict(), tmp_path / "bare.pth")
    train(tiny_panoptic(), dataset, recipe(1), str(tmp_path), weights=str(tmp_path / "bare.pth"))
    assert "no record of group counts" in caplog.text
    assert "semantic_branch.predictor.weight" in caplog.text


def test_mixed_precision_and_clipping(tiny_panoptic, dataset, tmp_path):
    model = tiny_panoptic()
    before = model.backbone.body.conv1.weight.detach().clone()
    train(model, dataset, recipe(1, amp=True, clip_grad_norm=1e-9), str(tmp_path))
    after = model.backbone.body.conv1.weight
    assert after.dtype == torch.float32
    # Gradients are clipped to nothing: what is left is weight decay.
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-5)


def test_learning_rate_rises_and_falls():
    plan = TrainingRecipe(iterations=100, batch_size=2, lr=0.1, warmup=9)
    factors = [_lr_factor(plan, i) for i in range(100)]
    assert factors[0] == pytest.approx(0.1, abs=0.001) and max(factors) < 1
    assert factors.index(max(factors)) == 9
    assert factors[50] == pytest.approx(0.5) and factors[99] < 0.001


def test_norms_do_not_decay(tiny_panoptic):
    model = tiny_panoptic()
    decayed, norms = _parameter_groups(model)
    assert decayed["decays"] and not norms["decays"]
    assert len(norms["params"]) == 2 * len(group_report(model))
    assert len(decayed["params"]) + len(norms["params"]) == len(list(model.parameters()))


def test_a_resumed_run_takes_the_recipe_it_is_given(tiny_panoptic, dataset, tmp_path):
    train(tiny_panoptic(), dataset, recipe(1), str(tmp_path))
    changed = recipe(2, lr=1e-5, weight_decay=0.5)
    train(tiny_panoptic(), dataset, changed, str(tmp_path), resume=True)
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    groups = saved["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0]
    assert all(g["lr"] <= 1e-5 for g in groups)
    assert metrics_of(tmp_path)[-1]["lr"] <= 1e-5


def test_a_resumed_run_sees_the_images_it_would_have_seen():
    whole = list(itertools.islice(_shuffled(10, 3, 0), 35))
    assert sorted(whole[:10]) == sorted(whole[10:20]) == list(range(10))
    assert whole[:10] != whole[10:20]
    for start in (4, 10, 27):
        assert list(itertools.islice(_shuffled(10, 3, start), 35 - start)) == whole[start:]


def test_another_model_is_not_resumed(tiny_panoptic, dataset, tmp_path):
    train(tiny_panoptic(), dataset, recipe(1), str(tmp_path))
    with pytest.raises(ValueError, match="model_final.pth is of another model: .*--depth"):
        train(tiny_panoptic(num_stuff=2), dataset, recipe(2), str(tmp_path), resume=True)


def test_a_new_run_does_not_point_to_an_old_ones_checkpoint(
    tiny_panoptic, dataset, tmp_path, caplog
):
    train(tiny_panoptic(), dataset, recipe(1), str(tmp_path))
    model = tiny_panoptic()
    with torch.no_grad():
        model.semantic_branch.predictor.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="There is no checkpoint in .* yet"):
        train(model, dataset, recipe(2), str(tmp_path))
    assert "holds checkpoints of an earlier run" in caplog.text


def test_accumulated_batches_are_those_of_a_larger_one(tiny_panoptic, dataset, tmp_path):
    seen = {}
    for accumulate, batch_size in ((1, 4), (2, 2)):
        model, images = tiny_panoptic(), seen.setdefault(accumulate, [])
        folder = tmp_path / str(accumulate)
        folder.mkdir()
        # Before the random flip, of which every loader's batch draws its own.
        dataset._transform = lambda image, target: (image.float() / 255, target)
        hook = model.register_forward_pre_hook(lambda _, args, kept=images: kept.extend(args[0]))
        options = {"accumulate": accumulate, "batch_size": batch_size}
        for iterations in (1, 2):  # the second run resumes
            stop = recipe(2, stop_at=iterations % 2, checkpoint_period=1, **options)
            train(model, dataset, stop, str(folder), resume=True)
        hook.remove()
        assert metrics_of(folder)[-1]["iteration"] == 1
    assert len(seen[1]) == len(seen[2]) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
