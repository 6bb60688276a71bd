import pytest

pytest.importorskip("torchvision", reason="torchvision is not installed")

import torch
import torch.nn.functional as F

from gnpractical.tv.panoptic_fpn import SemanticBranch, _batch_labels, merge


def rectangle(y0, y1, x0, x1, shape=(8, 10)):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_merge_by_hand():
    masks = torch.stack(
        [
            rectangle(0, 4, 0, 4),  # 16 pixels, second in rank: half are taken, so it stays
            rectangle(0, 4, 2, 6),  # first
            rectangle(0, 3, 1, 6),  # third: 15 pixels, all of them taken
            rectangle(6, 8, 0, 4),  # not sure enough
            rectangle(0, 0, 0, 0),  # empty
        ]
    )
    scores = torch.tensor([0.8, 0.9, 0.7, 0.4, 0.95])
    semantic = torch.ones(8, 10, dtype=torch.int64)
    semantic[:, 8:] = 2
    semantic[7, 5] = 3  # a single pixel
    semantic[4:6, :2] = 0  # things, of which the instances know nothing
    ids, segments = merge(masks, torch.tensor([3, 1, 2, 2, 4]), scores, semantic, 4)
    assert segments == [
        {"id": 1, "label": 1, "isthing": True},
        {"id": 2, "label": 3, "isthing": True},
        {"id": 3, "label": 1, "isthing": False},
        {"id": 4, "label": 2, "isthing": False},
    ]
    expected = torch.full((8, 10), 3)
    expected[:, 8:] = 4
    expected[:4, :4] = 2
    expected[:4, 2:6] = 1
    expected[7, 5] = 0
    expected[4:6, :2] = 0
    assert torch.equal(ids, expected)


def test_merge_is_detectron2s():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
    from detectron2.structures import Instances

    for _ in range(20):
        n, size = int(torch.randint(1, 12, ())), (24, 30)
        corner = (torch.rand(n, 2) * 20).int().tolist()
        masks = torch.stack([rectangle(y, y + 9, x, x + 11, size) for y, x in corner])
        labels, scores = torch.randint(1, 5, (n,)), torch.rand(n)
        semantic = torch.randint(0, 5, (4, 5)).repeat_interleave(6, 0).repeat_interleave(6, 1)
        found = Instances(size, pred_masks=masks, pred_classes=labels - 1, scores=scores)
        theirs, rows = combine_semantic_and_instance_outputs(found, semantic, 0.5, 40, 0.5)
        ids, segments = merge(masks, labels, scores, semantic, min_stuff_area=40)
        assert torch.equal(ids, theirs.long())
        assert [(s["id"], s["isthing"], s["label"] - s["isthing"]) for s in segments] == [
            (s["id"], s["isthing"], s["category_id"]) for s in rows
        ]


def test_semantic_branch_is_detectron2s():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead

    import gnpractical.d2  # noqa: F401 (its get_norm)
    from gnpractical.tv.builders import norm_layer

    theirs = SemSegFPNHead(
        {f"p{i + 2}": ShapeSpec(channels=16, stride=4 * 2**i) for i in range(4)},
        num_classes=5,
        conv_dims=8,
        common_stride=4,
        norm="GN_PRACTICAL",
    ).eval()
    mine = SemanticBranch(["0", "1", "2", "3"], 16, 8, 5, norm_layer("GN_PRACTICAL"))
    assert len(mine.state_dict()) == len(theirs.state_dict())
    mine.load_state_dict(dict(zip(mine.state_dict(), theirs.state_dict().values(), strict=True)))
    features = [torch.randn(2, 16, 32 // 2**i, 48 // 2**i) for i in range(4)]
    expected = theirs.layers({f"p{i + 2}": f for i, f in enumerate(features)})
    torch.testing.assert_close(mine({str(i): f for i, f in enumerate(features)}), expected)


def test_labels_are_resized_with_their_image_and_padded():
    label = torch.arange(6, dtype=torch.uint8).reshape(2, 3)
    batch = _batch_labels([label, label], [(4, 6), (2, 3)], torch.Size([5, 6]))
    assert torch.equal(batch[0, :4], label.repeat_interleave(2, 0).repeat_interleave(2, 1).long())
    assert (batch[0, 4] == 255).all()
    assert torch.equal(batch[1, :2, :3], label.long()) and (batch[1, 2:] == 255).all()


def target(semantic, boxes=((5.0, 5, 30, 30),)):
    n = len(boxes)
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.ones(n, dtype=torch.int64),
        "masks": torch.ones(n, *semantic.shape, dtype=torch.uint8),
        "semantic": semantic,
    }


def test_semantic_loss_is_the_cross_entropy_of_what_is_labelled(tiny_panoptic):
    model = tiny_panoptic(min_size=64, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    image = torch.rand(3, 64, 64)  # neither resized nor padded
    semantic = torch.randint(0, 5, (64, 64), dtype=torch.uint8)
    semantic[:10] = 255
    losses = model([image], [target(semantic)])
    logits = model.semantic_branch(model.backbone(image[None]))
    logits = F.interpolate(logits, (64, 64), mode="bilinear")
    expected = F.cross_entropy(logits[:, :, 10:], semantic[None, 10:].long())
    torch.testing.assert_close(losses["loss_semantic"], 0.5 * expected)


def test_trains_on_an_image_without_things_and_one_without_labels(tiny_panoptic):
    model = tiny_panoptic()
    nothing = target(torch.full((50, 80), 255, dtype=torch.uint8), boxes=())
    losses = model([torch.rand(3, 50, 80)], [nothing])
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total) and losses["loss_semantic"] == 0
    assert all(p.grad is not None for p in model.parameters())


def test_predictions(tiny_panoptic):
    model = tiny_panoptic(box_score_thresh=0.0).eval()
    sizes = [(60, 80), (50, 40)]
    for size, result in zip(sizes, model([torch.rand(3, *s) for s in sizes]), strict=True):
        assert result["panoptic_ids"].shape == size
        present = set(result["panoptic_ids"].unique().tolist()) - {0}
        assert present <= {s["id"] for s in result["segments"]}
        assert result["masks"].shape[1:] == (1, *size)


@pytest.mark.parametrize("targets", [None, [{"boxes": torch.zeros(0, 4)}]])
def test_training_needs_semantic_labels(tiny_panoptic, targets):
    with pytest.raises(ValueError, match="needs a target for each image, with its semantic labels"):
        tiny_panoptic()([torch.rand(3, 50, 80)], targets)


def test_targets_that_do_not_fit(tiny_panoptic):
    image, semantic = torch.rand(3, 50, 80), torch.zeros(50, 80, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"'semantic' is \(80, 50\) for an image of \(50, 80\)"):
        tiny_panoptic()([image], [target(semantic.T)])
    with pytest.raises(ValueError, match="x0 < x1"):
        tiny_panoptic()([image], [target(semantic, boxes=[[9.0, 9, 1, 1]])])
