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
MIN_SCORE = 0.5  # of an instance that becomes a segment
MAX_OVERLAP = 0.5  # the share of an instance that others may have taken


class PanopticFPN(MaskRCNN):
    """Mask R-CNN with a semantic branch.

    It is called as ``MaskRCNN`` is. In training, each target also has ``semantic`` (H, W): 0 for
    all things, 1, 2, ... for stuff, 255 where the loss looks away; the losses gain
    ``loss_semantic``. In evaluation each result also has

    * ``semantic`` (H, W) int64: the label of each pixel, 0 for all things;
    * ``panoptic_ids`` (H, W) int64: the id of each pixel's segment, 0 for none;
    * ``segments``: a dict of ``id``, ``label`` (of things and stuff, each counted from 1) and
      ``isthing`` for each segment.

    With ``merges`` set to False the last two are left out, for those who merge themselves.

    Args:
        backbone, **kwargs: Arguments of ``MaskRCNN``.
        semantic_branch: Gives logits at a quarter of the padded images' size.
        semantic_weight: The weight of its loss.
        min_stuff_area: Stuff segments of fewer pixels are left out.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        semantic_branch: nn.Module,
        semantic_weight: float = 0.5,
        min_stuff_area: int = 4096,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.semantic_branch = semantic_branch
        self.semantic_weight = semantic_weight
        self.min_stuff_area = min_stuff_area
        self.merges = True

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
            result["semantic"] = F.interpolate(
                image_logits[None, :, :h, :w], size, mode="bilinear", align_corners=False
            )[0].argmax(0)
            if self.merges:
                result["panoptic_ids"], result["segments"] = merge(
                    result["masks"][:, 0] > 0.5,
                    result["labels"],
                    result["scores"],
                    result["semantic"],
                    self.min_stuff_area,
                )
        return results


class SemanticBranch(nn.Module):
    """Sec. 3.1: each level is convolved and upsampled to a quarter of the image, and all summed.

    Args:
        levels: The names of the FPN's levels, the first of stride 4, each of twice the one before.
        in_channels, channels: The widths of the FPN and of this branch.
        num_classes: One for all things and one for each kind of stuff.
        norm_layer: Makes the norm of a number of channels.
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
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Logits (N, num_classes, H / 4, W / 4)."""
        return self.predictor(sum(branch(features[name]) for name, branch in self.levels.items()))


def merge(
    masks: Tensor, labels: Tensor, scores: Tensor, semantic: Tensor, min_stuff_area: int
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Instances by falling score, then stuff in what they leave; Sec. 4.

    Args:
        masks: (N, H, W) bool, with labels (N,) from 1 and scores (N,).
        semantic: (H, W), 0 for things.
        min_stuff_area: Stuff of fewer pixels is left out.

    Returns:
        ``panoptic_ids`` and ``segments``, as in :class:`PanopticFPN`.
    """
    ids = torch.zeros_like(semantic, dtype=torch.int64)
    segments: list[dict[str, Any]] = []

    def add(mask: Tensor, label: int, isthing: bool) -> None:
        ids[mask] = len(segments) + 1
        segments.append({"id": len(segments) + 1, "label": label, "isthing": isthing})

    for i in scores.argsort(descending=True).tolist():
        if scores[i] < MIN_SCORE:
            break
        free = masks[i] & (ids == 0)
        area, free_area = int(masks[i].sum()), int(free.sum())
        if area and (area - free_area) / area <= MAX_OVERLAP:
            add(free, int(labels[i]), True)
    for label in semantic.unique().tolist():
        mask = (semantic == label) & (ids == 0)
        if label and int(mask.sum()) >= min_stuff_area:
            add(mask, label, False)
    return ids, segments


def _check_targets(images: list[Tensor], targets: list[dict[str, Tensor]] | None) -> None:
    if not targets or len(targets) != len(images) or any("semantic" not in t for t in targets):
        raise ValueError(
            "in training Panoptic FPN needs a target for each image, with its semantic labels "
            "(H, W) as 'semantic' besides Mask R-CNN's boxes, labels and masks"
        )
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        boxes, shape, size = target["boxes"], target["semantic"].shape, image.shape[-2:]
        if shape != size:
            raise ValueError(
                f"target {i}: 'semantic' is {tuple(shape)} for an image of {tuple(size)}"
            )
        if (boxes[:, 2:] <= boxes[:, :2]).any():
            raise ValueError(
                f"target {i}: boxes must be x0, y0, x1, y1 with x0 < x1 and y0 < y1; "
                f"got {boxes.tolist()[:5]}"
            )


def _batch_labels(labels: list[Tensor], sizes: list[tuple[int, int]], padded: torch.Size) -> Tensor:
    """Label maps (N, H, W) int64, resized as their images were and padded with IGNORE_LABEL."""
    batch = labels[0].new_full((len(labels), *padded), IGNORE_LABEL, dtype=torch.int64)
    for i, (label, (h, w)) in enumerate(zip(labels, sizes, strict=True)):
        resized = F.interpolate(label[None, None].float(), size=(h, w), mode="nearest-exact")
        batch[i, :h, :w] = resized[0, 0].long()
    return batch
