from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="gnpractical",
    version="0.1.0",
    description="Per-layer GroupNorm group counts from layer widths, for Detectron2 and PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["gnpractical", "gnpractical.*"]),
    package_data={"gnpractical": ["py.typed"]},
    python_requires=">=3.10",
    # Detectron2 is on no registry, so it cannot be listed here; see the README.
    install_requires=[
        "torch>=2.4",
        "fvcore>=0.1.5,<0.1.6",
        "matplotlib",
        "numpy",
        "Pillow",
        # 2.0.9 and 2.0.10 demand an "info" entry that many annotation files lack.
        "pycocotools>=2.0.11",
        "scipy",
        "tabulate",
        "tqdm",
    ],
    extras_require={
        # gnpractical.tv and tools/train_torchvision.py; Detectron2 brings both itself.
        "tv": ["tensorboard", "torchvision"],
        "dev": [
            "pytest==9.0.3", "ruff==0.14.5", "mypy==1.18.2", "types-tabulate", "types-tqdm",
            # The tests of conversion and export.
            "onnx", "onnxruntime", "onnxscript", "timm",
        ],
    },
)
