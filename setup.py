"""Packaging. Ranges live here; constraints.txt pins the versions that the tests run with.

tests/versions.sh runs them with the oldest and the newest versions of torch, Triton, transformers.
"""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    # Everything but the op: the commands of una-fast and what they import.
    "train": [
        "numpy>=1.26",
        "transformers>=5.15",
        "peft>=0.20",
        "datasets>=4.7",
        "safetensors>=0.8",
        "pyyaml>=6",
        "tqdm>=4.66.3",
        "tensorboard>=2.18",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "markupsafe>=2.1",
    ],
    # kernels: Hugging Face's, whose name our folder must not hide.
    "test": [
        "pytest>=8",
        "pytest-benchmark>=5",
        "pytest-xdist>=3.6",
        "ruff>=0.14",
        "kernels>=0.10",
        "gguf>=0.17",
    ],
    "bench": ["pytest-benchmark>=5", "matplotlib>=3.9"],
    "docs": ["mkdocs-material>=9.5"],
    "flash": ["flash-attn>=2.8"],
    "gguf": ["gguf>=0.17"],
    "liger": ["liger-kernel>=0.8.5"],
    "optim": ["torchao>=0.16"],  # the first whose 8-bit DTensors know torch 2.11
    "trl": ["trl>=1.15"],
    "logging": ["wandb", "trackio"],
}

setup(
    name="una-fast",
    version="0.1.0",
    description="UNA alignment of language models at long context: fused loss, lean trainer",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["una_fast", "una_fast.*"]), "una_fast.kernels"],
    package_data={"una_fast.report": ["templates/*"]},
    # Hugging Face's own package is called `kernels`: ours is imported as una_fast.kernels alone.
    package_dir={"una_fast.kernels": "kernels"},
    # The op alone: it is installed beside the transformers of other trainers, or without any.
    install_requires=["torch>=2.11", "triton>=3.6; sys_platform == 'linux'"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["una-fast=una_fast.command:main"]},
)
