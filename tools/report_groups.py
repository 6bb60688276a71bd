#!/usr/bin/env python
"""Print the group count of every GroupNorm of a config's model, without data or weights.

python tools/report_groups.py --config-file configs/pfpn_gnp.yaml [--format csv] [KEY VALUE ...]
"""

import argparse
import csv
import dataclasses
import json
import logging
import sys

from detectron2.modeling import build_model

from gnpractical import format_report, group_report
from gnpractical.d2 import load_config
from gnpractical.runs.errors import in_one_line


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="path to a config file")
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table")
    parser.add_argument("--allow-unsafe-config", action="store_true", help="see train_net.py")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE ...")
    return parser.parse_args()


def main():
    args = parse_args()
    logging.basicConfig(level=logging.WARNING)
    cfg = load_config(args.config_file, args.opts, allow_unsafe=args.allow_unsafe_config)
    cfg.MODEL.DEVICE = "cpu"
    rows = group_report(build_model(cfg))
    records = [dataclasses.asdict(row) | {"flags": row.flags} for row in rows]
    if args.format == "table":
        print(format_report(rows))
    elif args.format == "json":
        print(json.dumps(records, indent=1))
    elif records:
        writer = csv.DictWriter(sys.stdout, records[0])
        writer.writeheader()
        writer.writerows(records)


if __name__ == "__main__":
    with in_one_line():
        main()
