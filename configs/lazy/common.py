"""What every config of this folder takes: the MODEL.GNP keys of YAML configs, in lower case."""

gnp = dict(
    weight_standardization=[],  # paths of parts, such as "backbone" and "roi_heads.box_head"
    checkpoint_mismatch="error",  # or "warn" or "ignore"
    match_batches=0,
    calibration_batches=2,
    probe_period=0,  # iterations
    stop_at=0,  # iterations
    check_annotations=True,
    accumulate=1,  # SOLVER.ACCUMULATE: batches for a step
)
