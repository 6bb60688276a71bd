"""What pyproject.toml promises, and what a built wheel holds."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gnpractical
from gnpractical.demo import configs_folder

if importlib.util.find_spec("tomllib"):
    import tomllib
else:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONFIGS = [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("configs/**/*.py")]
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]


def test_version_has_one_source():
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    assert SETUPTOOLS["dynamic"] == {"version": {"attr": "gnpractical.__version__"}}
    source = ast.parse((ROOT / "gnpractical" / "__init__.py").read_text(encoding="utf-8"))
    values = [
        ast.literal_eval(node.value)  # else setuptools would import the package, and so torch
        for node in source.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    ]
    assert values == [gnpractical.__version__]
    assert "version" not in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_every_folder_is_a_package_of_the_wheel():
    code = {path.parent for path in (ROOT / "gnpractical").rglob("*.py")}
    configs = {path.parent for path in CONFIGS}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in code}
    names |= {".".join(("gnpractical", *folder.relative_to(ROOT).parts)) for folder in configs}
    assert sorted(SETUPTOOLS["packages"]) == sorted(names)
    assert len(SETUPTOOLS["packages"]) == len(names)


def test_configs_are_found_with_their_bases():
    folder = configs_folder()
    assert (folder / "quick" / "pfpn_gnp_shapes.yaml").is_file()
    for config in folder.rglob("*.yaml"):
        for base in re.findall(r'^_BASE_: "(.*)"', config.read_text(encoding="utf-8"), re.M):
            path = (config.parent / base).resolve()
            assert path.is_file() and path.is_relative_to(folder.resolve())


def test_license_is_named_and_there():
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    for part in ("Apache License", "Version 2.0", "END OF TERMS", "The gnpractical authors"):
        assert part in text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built of a copy, since building leaves files in the folder."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} does not read SPDX licences; 77 does")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("gnpractical", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", out, source], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_everything(wheel):
    assert wheel.name == f"gnpractical-{gnpractical.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"gnpractical-{gnpractical.__version__}.dist-info/METADATA")
    assert b"License-Expression: Apache-2.0\n" in metadata
    assert f"gnpractical-{gnpractical.__version__}.dist-info/licenses/LICENSE" in names
    assert "gnpractical/py.typed" in names
    for path in ROOT.glob("gnpractical/**/*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    for path in CONFIGS:
        assert f"gnpractical/{path.relative_to(ROOT).as_posix()}" in names
    assert all(name.startswith("gnpractical") for name in names)


@pytest.mark.slow
def test_wheel_finds_its_configs_without_the_source_tree(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = "from gnpractical import demo; print(demo.configs_folder(), demo.__file__, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    folder, file = done.stdout.splitlines()
    assert Path(file) == tmp_path / "gnpractical" / "demo.py"
    assert Path(folder) == tmp_path / "gnpractical" / "configs"
    assert (Path(folder) / "quick" / "pfpn_gnp_shapes.yaml").is_file()
