#!/usr/bin/env python
"""Train or evaluate a Detectron2 model with per-layer group counts.

    python tools/train_net.py --config-file configs/pfpn_gnp.yaml --num-gpus 8 [KEY VALUE ...]

Also under torchrun, which then says how many processes there are.
"""

from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from gnpractical.d2 import load_config
from gnpractical.d2.launch import check_processes, launch
from gnpractical.d2.own_data import folder_overrides, register_own, use_own_data
from gnpractical.d2.trainer import Trainer, adapt_to_device
from gnpractical.runs.errors import in_one_line
from gnpractical.runs.output_dir import check_output_dir, claim_output_dir


def read_config(args):
    cfg = load_config(args.config_file, args.opts, allow_unsafe=args.allow_unsafe_config)
    if args.data:
        panoptic = "Panoptic" in cfg.MODEL.META_ARCHITECTURE
        cfg.merge_from_list(folder_overrides(args.data, panoptic=panoptic))
    use_own_data(cfg, *own_splits(args))
    adapt_to_device(cfg)
    cfg.freeze()
    return cfg


def own_splits(args):
    return ("TEST",) if args.eval_only else ("TRAIN", "TEST")


def main(args, cfg):
    with in_one_line():
        return run(args, cfg)


def run(args, cfg):
    if comm.is_main_process():
        claim_output_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    default_setup(cfg, args)
    register_own(cfg, *own_splits(args))  # this may be another process
    if args.eval_only:
        results = Trainer.evaluate(cfg, resume=args.resume)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def parse_args():
    parser = default_argument_parser(epilog=__doc__)
    # Detectron2's default is one port a user, so that two runs on a machine collide.
    parser.set_defaults(dist_url="auto")
    data_help = "your own data in COCO's layout: annotations/instances_{train,val}.json, train, val"
    parser.add_argument("--data", metavar="DIR", help=data_help)
    parser.add_argument(
        "--allow-unsafe-config",
        action="store_true",
        help="read YAML that constructs Python objects, which can run any code; some of "
        "Detectron2's own files need it",
    )
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    with in_one_line():  # before any process is started
        config = read_config(arguments)
        check_processes(arguments)
        check_output_dir(config.OUTPUT_DIR, "OUTPUT_DIR")
        launch(main, arguments, config)
