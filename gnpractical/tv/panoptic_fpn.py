"""Panoptic FPN: torchvision's Mask R-CNN, a semantic branch on the same FPN, and their merge.

Source: "Panoptic Feature Pyramid Networks", arXiv 1901.02446.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.ops import Conv2dNormActivation

from gnpractical.datasets.panoptic import IGNORE_LABEL

STRIDE = 4  # of the semantic branch's output, and of the FPN's finest level

Segment = dict[str, Any]


class PanopticFPN(MaskRCNN):
    """Mask R-CNN with a semantic branch.

    Called as ``MaskRCNN`` is. In training, each target also has ``semantic`` (H, W): 0 for all
    things, 1, 2, ... for stuff, 255 where the loss looks away; the losses gain
    ``loss_semantic``. In evaluation each result also has

    * ``panoptic_ids`` (H, W) int64: the id of each pixel's segment, 0 for none;
    * ``segments``: a dict of ``id``, ``label`` (of things and stuff, each counted from 1) and
      ``isthing`` for each segment.

    Args:
        backbone, num_classes, **kwargs: as of ``MaskRCNN``.
        semantic_branch: gives logits at a quarter of the padded images' size.
        semantic_weight: of its loss.
        min_score, max_overlap, min_stuff_area: as of :func:`merge`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int | None = None,
        *,
        semantic_branch: nn.Module,
        semantic_weight: float = 0.5,
        min_score: float = 0.5,
        max_overlap: float = 0.5,
        min_stuff_area: int = 4096,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **kwargs)
        self.semantic_branch = semantic_branch
        self.semantic_weight = semantic_weight
        self.merge_options = (min_score, max_overlap, min_stuff_area)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        if self.training:
            _check_targets(images, targets)
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, targets = self.transform(images, targets)
        features = self.backbone(batch.tensors)
        proposals, losses = self.rpn(batch, features, targets)
        results, roi_losses = self.roi_heads(features, proposals, batch.image_sizes, targets)
        logits = self.semantic_branch(features).float()
        logits = F.interpolate(logits, scale_factor=STRIDE, mode="bilinear", align_corners=False)
        if self.training:
            assert targets is not None
            labels = _batch_labels(
                [target["semantic"] for target in targets], batch.image_sizes, logits.shape[-2:]
            )
            loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_LABEL, reduction="sum")
            loss = loss / (labels != IGNORE_LABEL).sum().clamp(min=1)  # there may be none
            return losses | roi_losses | {"loss_semantic": self.semantic_weight * loss}
        results = self.transform.postprocess(results, batch.image_sizes, sizes)
        for result, image_logits, (h, w), size in zip(
            results, logits, batch.image_sizes, sizes, strict=True
        ):
            semantic = F.interpolate(
                image_logits[None, :, :h, :w], size, mode="bilinear", align_corners=False
            )[0].argmax(0)
            result["panoptic_ids"], result["segments"] = merge(
                result["masks"][:, 0] > 0.5,
                result["labels"],
                result["scores"],
                semantic,
                *self.merge_options,
            )
        return results


class SemanticBranch(nn.Module):
    """Sec. 3.1: each level is convolved and upsampled to a quarter of the image, and all summed.

    Args:
        levels: names of the FPN's levels, the first of stride 4, each of twice the one before.
        in_channels, channels: width of the FPN, and of this branch.
        num_classes: one for all things, and each kind of stuff.
        norm_layer: makes the norm of a number of channels.
    """

    def __init__(
        self,
        levels: Sequence[str],
        in_channels: int,
        channels: int,
        num_classes: int,
        norm_layer: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleDict()
        for number, level in enumerate(levels):
            blocks: list[nn.Module] = []
            for i in range(max(number, 1)):
                width = channels if i else in_channels
                blocks.append(Conv2dNormActivation(width, channels, norm_layer=norm_layer))
                if number:
                    blocks.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            self.levels[level] = nn.Sequential(*blocks)
        self.predictor = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Logits (N, num_classes, H / 4, W / 4)."""
        return self.predictor(sum(branch(features[name]) for name, branch in self.levels.items()))


def merge(
    masks: Tensor,
    labels: Tensor,
    scores: Tensor,
    semantic: Tensor,
    min_score: float = 0.5,
    max_overlap: float = 0.5,
    min_stuff_area: int = 4096,
) -> tuple[Tensor, list[Segment]]:
    """Instances by falling score, then stuff in what they leave; Sec. 4.

    Args:
        masks: (N, H, W) bool, with labels (N,) from 1 and scores (N,).
        semantic: (H, W), 0 for things.
        min_score: instances below are left out.
        max_overlap: so is one of which a larger share is taken already.
        min_stuff_area: and stuff of fewer pixels.

    Returns:
        Segment ids (H, W) int64, and the segments: see :class:`PanopticFPN`.
    """
    ids = torch.zeros_like(semantic, dtype=torch.int64)
    segments: list[Segment] = []

    def add(mask: Tensor, label: int, isthing: bool) -> None:
        ids[mask] = len(segments) + 1
        segments.append({"id": len(segments) + 1, "label": label, "isthing": isthing})

    for i in scores.argsort(descending=True).tolist():
        if scores[i] < min_score:
            break
        free = masks[i] & (ids == 0)
        area, free_area = int(masks[i].sum()), int(free.sum())
        if area and (area - free_area) / area <= max_overlap:
            add(free, int(labels[i]), True)
    for label in semantic.unique().tolist():
        mask = (semantic == label) & (ids == 0)
        if label and int(mask.sum()) >= min_stuff_area:
            add(mask, label, False)
    return ids, segments


def _check_targets(images: list[Tensor], targets: list[dict[str, Tensor]] | None) -> None:
    if len(targets or []) != len(images) or any("semantic" not in t for t in targets or []):
        raise ValueError(
            "in training Panoptic FPN needs a target for each image, with its semantic labels "
            "(H, W) as 'semantic' besides Mask R-CNN's boxes, labels and masks"
        )
    for i, (image, target) in enumerate(zip(images, targets or [], strict=True)):
        if target["semantic"].shape != image.shape[-2:]:
            raise ValueError(
                f"target {i}: 'semantic' is {tuple(target['semantic'].shape)} for an "
                f"image of {tuple(image.shape[-2:])}"
            )
        boxes = target["boxes"]
        if (boxes[:, 2:] <= boxes[:, :2]).any():
            raise ValueError(
                f"target {i}: boxes must be x0, y0, x1, y1 with x0 < x1 and y0 < y1; "
                f"got {boxes.tolist()[:5]}"
            )


def _batch_labels(labels: list[Tensor], sizes: list[tuple[int, int]], padded: torch.Size) -> Tensor:
    """Label maps resized as their images were, and padded with IGNORE_LABEL: (N, H, W) int64."""
    batch = labels[0].new_full((len(labels), *padded), IGNORE_LABEL, dtype=torch.int64)
    for i, (label, (h, w)) in enumerate(zip(labels, sizes, strict=True)):
        resized = F.interpolate(label[None, None].float(), size=(h, w), mode="nearest-exact")
        batch[i, :h, :w] = resized[0, 0].long()
    return batch
