#!/usr/bin/env python
"""Train or evaluate Faster R-CNN or Panoptic FPN on torchvision; see --help."""

from gnpractical.runs.errors import in_one_line
from gnpractical.tv.options import parse_args
from gnpractical.tv.run import run

if __name__ == "__main__":
    with in_one_line():
        run(parse_args())
