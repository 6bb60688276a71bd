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
        first = point = next(iter(following))
        corners: list[tuple[int, int]] = []
        previous = (0, 0)
        doubled_area = 0
        while True:
            options = following[point]
            after = options.pop()
            if not options:
                del following[point]
            doubled_area += point[0] * after[1] - after[0] * point[1]
            direction = (after[0] - point[0], after[1] - point[1])
            if direction != previous:
                corners.append(point)
            previous = direction
            point = after
            if point == first:
                break
        if doubled_area > 0:  # holes run the other way round
            polygons.append([float(v) for corner in corners for v in corner])
    return polygons
