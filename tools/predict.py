#!/usr/bin/env python
"""Predict on your own pictures with a model that train_net.py or train_torchvision.py left.

    python tools/predict.py --weights output/shapes --input photos --output output/predictions

What the model is, is read from the run's folder. Of every picture comes one with what was found;
with --json also COCO's results: coco_instances_results.json, and of panoptic models
panoptic_predictions.json with its PNGs. Files that are no pictures are named and left out.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from gnpractical.datasets.own_images import find_images, output_names, read_pixels
from gnpractical.datasets.panoptic_evaluation import panoptic_prediction
from gnpractical.datasets.predictions import draw
from gnpractical.runs.device import resolve_device
from gnpractical.runs.errors import in_one_line
from gnpractical.runs.output_dir import (
    RUN_FILE,
    check_output_dir,
    claim_output_dir,
    write_atomically,
    write_text,
)
from gnpractical.runs.saved_run import find_run


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weights", required=True, metavar="PATH", help="a run's folder, or a checkpoint in it")
    add("--input", required=True, nargs="+", metavar="PATH", help="files, folders, patterns")
    add("--output", required=True, type=Path, metavar="DIR")
    threshold = "what instances must score to be drawn and written (0.5); 0 to compute AP"
    add("--threshold", type=float, default=0.5, metavar="X", help=threshold)
    add("--json", action="store_true", help="write COCO's results, too")
    add("--device", metavar="NAME", help="cuda, cpu, ...; default: cuda where there is one")
    return parser.parse_args()


def load(run, device):
    """Return a function of pixels to predictions, and the names of the classes."""
    if run.of_detectron2:
        from gnpractical.d2 import saved_model
    else:
        from gnpractical.tv import saved_model
    model, classes, *config = saved_model.load_model(run, device)
    return partial(saved_model.predict, model, classes, *config), classes


def predict(args, paths, predict_one, names):
    """Write the pictures, and return COCO's entries: images, instances, panoptic annotations."""
    instances, panoptic, images, skipped = [], [], [], []
    pictures = output_names(paths, ".jpg")
    for number, path in enumerate(tqdm(paths, unit="picture", disable=None), 1):
        try:
            pixels = read_pixels(path)
        except ValueError as e:
            skipped.append(str(e))
            tqdm.write(f"skipped: {e}")
            continue
        found = predict_one(pixels)
        target = args.output / pictures[number - 1]
        target.parent.mkdir(parents=True, exist_ok=True)
        drawn = draw(pixels, found, names, args.threshold)
        # Not into what may be a link to the picture itself.
        write_atomically(target, partial(Image.fromarray(drawn).save, format="JPEG", quality=92))
        height, width, _ = pixels.shape
        images.append({"id": number, "file_name": str(path), "height": height, "width": width})
        of = {"image_id": number, "file_name": str(path)}
        instances += [of | i for i in found.instances if i["score"] >= args.threshold]
        if found.ids is not None:
            panoptic.append(panoptic_prediction(number, found.ids, found.segments))
    if not images:
        raise ValueError(f"none of the {len(paths)} files could be read, first: {skipped[0]}")
    also = f", {len(skipped)} files were skipped" if skipped else ""
    print(f"{args.output}: {len(images)} pictures with {len(instances)} instances{also}")
    return images, instances, panoptic


def write_json(output, names, images, instances, panoptic):
    write_text(output / "coco_instances_results.json", json.dumps(instances))
    if panoptic:
        (output / "panoptic").mkdir(exist_ok=True)
        for entry in panoptic:
            (output / "panoptic" / entry["file_name"]).write_bytes(entry.pop("png_string"))
        categories = [
            {"id": category_id, "name": name, "isthing": int(kind == "things")}
            for kind, of_kind in names.items()
            for category_id, name in of_kind.items()
        ]
        data = {"images": images, "annotations": panoptic, "categories": categories}
        write_text(output / "panoptic_predictions.json", json.dumps(data))


def main():
    args = parse_args()
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold must be between 0 and 1, got {args.threshold}")
    run, paths = find_run(args.weights), find_images(args.input, args.output, RUN_FILE)
    device = resolve_device(args.device)
    check_output_dir(str(args.output), "--output")
    claim_output_dir(args.output, "--output")
    predict_one, names = load(run, str(device))
    results = predict(args, paths, predict_one, names)
    if args.json:
        write_json(args.output, names, *results)


if __name__ == "__main__":
    with in_one_line():
        main()
