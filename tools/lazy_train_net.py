#!/usr/bin/env python
"""Train or evaluate a LazyConfig of Detectron2's with per-layer group counts.

    python tools/lazy_train_net.py --config-file configs/lazy/pfpn_gnp_full.py --num-gpus 8 \\
        [key=value ...]

Does all that train_net.py does with YAML configs. The file is Python code, which is run.
"""

from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm

from gnpractical.d2.launch import check_processes, launch
from gnpractical.d2.lazy import lazy_trainer, lazy_words, yaml_config
from gnpractical.d2.lazy_config import load_lazy_config
from gnpractical.d2.own_data import register_own
from gnpractical.d2.trainer import adapt_to_device
from gnpractical.runs.errors import in_one_line
from gnpractical.runs.output_dir import check_output_dir, claim_output_dir


def main(args, cfg):
    with in_one_line(), lazy_words():
        return run(args, cfg)


def run(args, cfg):
    # Read here, since a LazyConfig may hold what cannot be sent to another process.
    lazy = load_lazy_config(args.config_file, args.opts)
    if comm.is_main_process():
        claim_output_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    default_setup(lazy, args)
    register_own(cfg, *(("TEST",) if args.eval_only else ("TRAIN", "TEST")))
    trainer_class = lazy_trainer(lazy)
    if args.eval_only:
        return trainer_class.evaluate(cfg, resume=args.resume)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    parser.set_defaults(dist_url="auto")  # else one port a user, so that two runs would collide
    arguments = parser.parse_args()
    with in_one_line(), lazy_words():  # before any process is started
        config = yaml_config(load_lazy_config(arguments.config_file, arguments.opts))
        adapt_to_device(config)
        config.freeze()
        check_processes(arguments)
        check_output_dir(config.OUTPUT_DIR, "OUTPUT_DIR")
        launch(main, arguments, config)
