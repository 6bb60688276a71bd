#!/usr/bin/env python
"""Make the semantic PNGs that Panoptic FPN trains on from COCO's panoptic annotations.

    python tools/prepare_panoptic.py --root datasets/coco

reads <root>/annotations/panoptic_{train,val}2017.json and <root>/panoptic_{train,val}2017/, and
writes <root>/panoptic_stuff_{train,val}2017/. Interrupted, it goes on where it was.
"""

import argparse
from pathlib import Path

from gnpractical.datasets.coco_files import check_annotations
from gnpractical.datasets.panoptic import prepare_semantic
from gnpractical.runs.errors import in_one_line


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", required=True, type=Path, metavar="DIR", help="COCO's folder")
    parser.add_argument("--output", type=Path, metavar="DIR", help="written here instead of --root")
    parser.add_argument(
        "--splits",
        nargs="+",
        default=["train2017", "val2017"],
        metavar="SPLIT",
        help="default: train2017 val2017",
    )
    parser.add_argument("--workers", type=int, help="threads; default: one a core")
    args = parser.parse_args()

    for split in args.splits:
        annotations = args.root / "annotations" / f"panoptic_{split}.json"
        output = (args.output or args.root) / f"panoptic_stuff_{split}"
        if not annotations.is_file():
            raise ValueError(
                f"{annotations} does not exist; --root must hold annotations/ with COCO's "
                f"panoptic annotations, and panoptic_{split}/ with their PNGs"
            )
        pngs = args.root / f"panoptic_{split}"
        files = {"panoptic_json": str(annotations), "panoptic_root": str(pngs)}
        check_annotations(split, files, "make the semantic PNGs otherwise")
        written = prepare_semantic(annotations, pngs, output, workers=args.workers)
        print(f"{output}: {written} files written")


if __name__ == "__main__":
    with in_one_line():
        main()
