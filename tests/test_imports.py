"""Which folder may import what; DESIGN in one test."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gnpractical"
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def own(path):
    return {n.split(".")[1] for n in imports_of(path) if n.startswith("gnpractical.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    folder = path.relative_to(PACKAGE).parts[0]
    external = {n.split(".")[0] for n in imports_of(path)}
    if folder not in ("d2", "demo.py"):
        assert "detectron2" not in external
    if folder != "tv":
        assert "torchvision" not in external
    rules = {"num_groups", "gradient_law", "activation_gain"}
    allowed = {
        "num_groups.py": set(),
        "gradient_law.py": {"num_groups"},
        "activation_gain.py": {"num_groups"},
        "layers": rules | {"layers"},
        "datasets": {"datasets"},
        "measure": rules | {"layers", "measure"},
        "runs": rules | {"layers", "measure", "runs"},
        "paper": rules | {"layers", "measure", "runs", "paper"},
        "d2": rules | {"layers", "measure", "runs", "datasets", "d2"},
        "tv": rules | {"layers", "measure", "runs", "datasets", "tv"},
        "__init__.py": rules | {"layers", "measure"},
        "demo.py": {"runs", "d2", "tv"},
    }
    assert own(path) <= allowed[folder], path
    assert "matplotlib" not in external or path.name == "plots.py"
    if folder == "num_groups.py":
        assert external - {"__future__"} <= set(sys.stdlib_module_names)


def test_importing_the_package_pulls_in_torch_at_most():
    script = (
        "import sys, gnpractical\n"
        "heavy = {'detectron2', 'torchvision', 'fvcore', 'matplotlib', 'scipy', 'hotcoco'}\n"
        "heavy |= {'pycocotools', 'PIL', 'torch._dynamo', 'sympy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_rules_need_no_torch():
    script = (
        "import sys; sys.modules['torch'] = None\n"
        f"import runpy; runpy.run_path({str(PACKAGE / 'num_groups.py')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
