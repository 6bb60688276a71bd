import time
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.modeling import build_model

from gnpractical import group_report
from gnpractical.d2 import load_config
from gnpractical.layers.pairing import require_resolved

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted(p for p in CONFIGS.rglob("*.yaml") if not p.name.startswith("Base"))


def groups_of(path):
    cfg = load_config(str(CONFIGS / path), ["MODEL.DEVICE", "cpu"])
    return group_report(build_model(cfg))


@pytest.mark.parametrize("path", MODELS, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_config_builds_with_every_norm_resolved(path):
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    require_resolved(model)
    rows = group_report(model)
    assert rows and all(r.in_channels for r in rows)
    row = next(part for part in path.stem.split("_") if part.startswith("gn"))
    fixed = {"gnp": None, "gn32": 32, "gn1": 1}[row]
    if fixed:
        assert {r.num_groups for r in rows} == {fixed}
    else:
        backbone = {"GN_32" if path.stem.endswith("_jhu") else "GN_PRACTICAL"}
        assert {r.norm for r in rows if ".bottom_up." in r.name} in (backbone, set())
        assert {r.norm for r in rows if ".bottom_up." not in r.name} == {"GN_PRACTICAL"}
    assert all(r.weight_standardized for r in rows) == ("_ws" in path.stem)
    assert not any(r.frozen for r in rows)
    assert cfg.OUTPUT_DIR == f"output/{path.stem}"


def test_there_are_the_papers_rows():
    names = {str(p.relative_to(CONFIGS)) for p in MODELS}
    for k in ("gnp", "gn32", "gn1"):
        assert {f"pfpn_{k}.yaml", f"pfpn_{k}_full.yaml", f"faster_rcnn_{k}_ws.yaml"} <= names
        assert {f"quick/pfpn_{k}_shapes.yaml", f"quick/faster_rcnn_{k}_ws_shapes.yaml"} <= names


def test_rows_differ_in_their_norms_only():
    for base in ["pfpn_{}.yaml", "pfpn_{}_full.yaml", "faster_rcnn_{}_ws.yaml"]:
        dumps = set()
        for k in ("gnp", "gn32", "gn1"):
            cfg = load_config(str(CONFIGS / base.format(k)))
            for section in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD"):
                cfg.MODEL[section].NORM = ""
            cfg.OUTPUT_DIR = ""
            dumps.add(cfg.dump())
        assert len(dumps) == 1


def test_published_panoptic_fpn_has_group_norm_in_the_semantic_branch_only():
    rows = groups_of("pfpn_gnp.yaml")
    assert [r.name.split(".")[0] for r in rows] == ["sem_seg_head"] * 7
    assert sorted(r.num_groups for r in rows) == [1, 1, 1, 32, 32, 32, 32]


GROUP_NORMS = ["MODEL.RESNETS.NORM", "GN_PRACTICAL", "MODEL.FPN.NORM", "GN_CLOSEST"]


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
@pytest.mark.parametrize("name", ["build_gnp_resnet_backbone", "build_gnp_resnet_fpn_backbone"])
def test_registered_backbones(name, depth):
    if depth == 152 and "fpn" in name:
        pytest.skip("as slow to build as it is alike to 101")
    from detectron2.modeling import build_backbone

    options = ["MODEL.RESNETS.DEPTH", str(depth), "MODEL.BACKBONE.NAME", name, *GROUP_NORMS]
    cfg = load_config("", options)
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    rows = group_report(build_backbone(cfg))
    blocks = {18: 8 * 2, 34: 16 * 2, 50: 16 * 3, 101: 33 * 3, 152: 50 * 3}[depth]
    shortcuts = 3 if depth < 50 else 4
    norms = [row.norm for row in rows]
    assert norms.count("GN_PRACTICAL") == 1 + blocks + shortcuts
    assert norms.count("GN_CLOSEST") == 8 * ("fpn" in name)


def test_backbones_do_what_the_config_says_and_leave_it(tiny_cfg):
    opts = ["MODEL.RESNETS.NORM", "GN_4", "MODEL.FPN.NORM", "GN_8"]
    opts += ["MODEL.RESNETS.STRIDE_IN_1X1", "True"]
    cfg = tiny_cfg(*opts)
    before = cfg.dump()
    model = build_model(cfg)
    assert cfg.dump() == before
    norms = {row.name: row.num_groups for row in group_report(model.backbone)}
    for name, num_groups in norms.items():
        assert num_groups == (8 if name.startswith("fpn") else 4), name


@pytest.mark.parametrize("section", ["RESNETS", "FPN"])
@pytest.mark.parametrize("norm", ["FrozenBN", ""])
def test_gnp_backbones_say_which_key_needs_a_group_norm(tiny_cfg, section, norm):
    with pytest.raises(ValueError, match=rf"MODEL\.{section}\.NORM, got '{norm}': set MODEL"):
        build_model(tiny_cfg(f"MODEL.{section}.NORM", norm))


def test_the_key_that_was_renamed(tmp_path):
    for message in (
        error_of("", ["MODEL.GNP.NORM", "GN_1"]),
        error_of(write(tmp_path, "MODEL:\n  GNP:\n    NORM: GN_1\n")),
    ):
        assert "MODEL.RESNETS.NORM" in message and "MODEL.FPN.NORM" in message


def write(tmp_path, text):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return str(path)


def error_of(*args, **kwargs):
    with pytest.raises(ValueError) as e:
        load_config(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_missing_file():
    assert "'no/such.yaml' does not exist" in error_of("no/such.yaml")


def test_missing_base_file(tmp_path):
    assert "none.yaml" in error_of(write(tmp_path, '_BASE_: "none.yaml"\n'))


def test_unknown_key_names_the_nearest_and_the_file(tmp_path):
    message = error_of(write(tmp_path, "MODEL:\n  SEM_SEG_HEAD:\n    NROM: GN\n"))
    assert "my.yaml" in message
    assert "Non-existent config key: MODEL.SEM_SEG_HEAD.NROM" in message
    assert "nearest valid key is MODEL.SEM_SEG_HEAD.NORM" in message


def test_unknown_key_on_the_command_line():
    message = error_of("", ["SOLVER.BASE_RL", "0.1"])
    assert message.startswith("command line: ")
    assert "SOLVER.BASE_RL" in message and "SOLVER.BASE_LR" in message


def test_wrong_type(tmp_path):
    message = error_of(write(tmp_path, "SOLVER:\n  BASE_LR: fast\n"))
    assert "my.yaml" in message and "SOLVER.BASE_LR" in message
    assert "SOLVER.BASE_LR" in error_of("", ["SOLVER.BASE_LR", "fast"])


def test_malformed_yaml(tmp_path):
    assert "my.yaml" in error_of(write(tmp_path, "MODEL: [1, 2\n"))
    assert "my.yaml" in error_of(write(tmp_path, "- 1\n- 2\n"))


def test_sections_without_keys_loops_and_devices(tmp_path):
    assert "my.yaml: config keys must be in mappings" in error_of(write(tmp_path, "MODEL: 3\n"))
    assert "leads back to itself" in error_of(write(tmp_path, '_BASE_: "my.yaml"\n'))
    assert "MODEL.DEVICE must be a device" in error_of("", ["MODEL.DEVICE", "gpu"])
    options = ["TEST.AUG.ENABLED", "True", "MODEL.META_ARCHITECTURE", "PanopticFPN"]
    assert "for GeneralizedRCNN only, not for PanopticFPN" in error_of("", options)
    assert "MODEL.RESNETS.NORM" in error_of("", ["MODEL.RESNETS.norm", "GN"])


def test_odd_overrides():
    assert "pairs of KEY VALUE" in error_of("", ["SOLVER.BASE_LR"])


def test_unknown_norm_names_the_config_key(tmp_path):
    message = error_of(write(tmp_path, "MODEL:\n  FPN:\n    NORM: GN_PRATICAL\n"))
    assert "MODEL.FPN.NORM: Unknown norm 'GN_PRATICAL'" in message
    assert "Did you mean 'GN_PRACTICAL'" in message


@pytest.mark.parametrize(
    "options, expected",
    [
        (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER must be at least 1, got 0"),
        (["SOLVER.CHECKPOINT_PERIOD", "-5"], "SOLVER.CHECKPOINT_PERIOD must be at least 1"),
        (["SOLVER.BASE_LR", "nan"], "SOLVER.BASE_LR"),
        (["MODEL.GNP.STOP_AT", "-1"], "MODEL.GNP.STOP_AT must be at least 0, got -1"),
        (["INPUT.MIN_SIZE_TRAIN", "()"], "INPUT.MIN_SIZE_TRAIN must be at least 1, got ()"),
        (["INPUT.MIN_SIZE_TEST", "-5"], "INPUT.MIN_SIZE_TEST must be at least 0, got -5"),
        (["INPUT.MASK_FORMAT", "rle"], "must be one of polygon, bitmask; got 'rle'"),
        (["MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]"], "MODEL.PIXEL_STD must be at least"),
        (["MODEL.PIXEL_STD", "[1.0]"], "must have a value for each channel"),
        (["MODEL.RESNETS.DEPTH", "51"], "DEPTH must be one of 18, 34, 50, 101, 152; got 51"),
    ],
)
def test_numbers_out_of_range(options, expected):
    assert expected in error_of("", options)


def test_aliases_that_unfold_to_gigabytes(tmp_path):
    lines = ["a0: &a0 [1, 1]"]
    lines += [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(12)]
    assert "it has 120 YAML aliases" in error_of(write(tmp_path, "\n".join(lines)))


def test_unknown_mismatch_choice():
    message = error_of("", ["MODEL.GNP.CHECKPOINT_MISMATCH", "stop"])
    assert "error, warn, ignore" in message and "'stop'" in message


def test_yaml_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    victim = tmp_path / "ran"
    path = write(
        tmp_path,
        f'OUTPUT_DIR: !!python/object/apply:eval ["open({str(victim)!r}, \\"w\\").name"]\n',
    )
    assert "--allow-unsafe-config" in error_of(path)
    assert not victim.exists()
    assert load_config(path, allow_unsafe=True).OUTPUT_DIR == str(victim)
    assert victim.exists()


def test_unsafe_base_is_refused_too(tmp_path):
    (tmp_path / "base.yaml").write_text('OUTPUT_DIR: !!python/object/apply:str ["x"]\n')
    assert "--allow-unsafe-config" in error_of(write(tmp_path, '_BASE_: "base.yaml"\n'))


def test_keys_that_stand_twice(tmp_path):
    text = "MODEL: {FPN: {NORM: GN_1}}\nSEED: 1\nMODEL: {RESNETS: {NORM: GN_1}}\n"
    assert "line 3: 'MODEL' stands twice in one mapping" in error_of(write(tmp_path, text))


def test_aliases_are_looked_at_once(tmp_path):
    levels = [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 25)]  # 2**24 leaves
    text = "\n".join(["a0: &a0 [1]", *levels])
    start = time.perf_counter()
    assert "Non-existent config key: a0" in error_of(write(tmp_path, text))
    assert time.perf_counter() - start < 3
    error = error_of(write(tmp_path, "MODEL: &m\n  FPN: [*m]\n"))
    assert "leads back to itself" not in error
