"""Packaging of seqlen-curriculum; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="seqlen-curriculum",
    version="0.1.0",
    description="Sequence length warmup for GPT pre-training with DeepSpeed: exact, resumable, planned before it starts",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["seqlen_curriculum", "seqlen_curriculum.*"]),
    package_data={"seqlen_curriculum": ["py.typed", "analysis/templates/*"]},
    entry_points={
        "console_scripts": [f"{name}=seqlen_curriculum.cli:main" for name in ("seqlen-curriculum", "slw")],
    },
    install_requires=[
        "deepspeed>=0.19,<0.20",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pydantic>=2.6",
        "scipy>=1.11",
        "tokenizers>=0.20",
        "torch>=2.6",
        "tqdm>=4.66",
        "transformers>=5.0",
        "zstandard>=0.22",
    ],
    extras_require={
        "datasets": ["datasets>=3.0"],
        "dev": [
            "datasets>=3.0",
            "hypothesis>=6.100",
            "lm-eval>=0.4.13",
            "megatron-core>=0.12",
            "mypy>=1.10",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "tensorboard>=2.16",
            "wandb>=0.19",
        ],
        "eval": ["lm-eval>=0.4.13"],
    },
)
