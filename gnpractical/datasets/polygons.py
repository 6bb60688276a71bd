"""Outlines of masks as COCO polygons."""

from __future__ import annotations

import numpy as np


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Outlines of a mask (H, W) along its pixels' edges, as COCO polygons [x0, y0, x1, y1, ...].

    One polygon for each connected part. COCO polygons cannot have holes, so holes are filled.
    """
    padded = np.pad(mask.astype(bool), 1)
    inside = padded[1:-1, 1:-1]
    # Edges of boundary pixels, directed so that the mask lies to their right (y points down).
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for dy, dx, start, step in [
        (-1, 0, (0, 0), (1, 0)),  # above is outside: along the top, to the right
        (0, 1, (1, 0), (0, 1)),
        (1, 0, (1, 1), (-1, 0)),
        (0, -1, (0, 1), (0, -1)),
    ]:
        shifted = padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx]
        for y, x in np.argwhere(inside & ~shifted).tolist():
            point = (x + start[0], y + start[1])
            following.setdefault(point, []).append((point[0] + step[0], point[1] + step[1]))

    polygons = []
    while following:
        outline = [next(iter(following))]
        while len(outline) == 1 or outline[-1] != outline[0]:
            point = outline[-1]
            outline.append(following[point].pop())
            if not following[point]:
                del following[point]
        points = np.array(outline, dtype=float)
        steps = np.diff(points, axis=0)
        points = points[:-1]
        area = (points[:, 0] * steps[:, 1] - points[:, 1] * steps[:, 0]).sum() / 2
        if area > 0:  # holes run the other way round
            is_corner = (steps != np.roll(steps, 1, axis=0)).any(axis=1)
            is_corner[0] = True
            polygons.append(points[is_corner].ravel().tolist())
    return polygons
