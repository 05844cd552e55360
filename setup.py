"""Packaging of lrm_jax. Lower bounds only: a cap here breaks somebody's environment tomorrow."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="lrm_jax",
    version="0.2.0",
    description="Feed-forward 3D reconstruction in JAX: LRM, OpenLRM, TripoSR, LVSM, with two-way PyTorch checkpoints",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
    packages=find_packages(include=["lrm_jax", "lrm_jax.*"]),
    package_data={"lrm_jax": ["assets/*", "assets/*/*"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "einops>=0.8",
        "numpy>=2.0",
        "tensorflow-datasets>=4.9.10",
        "grain>=0.2.18",
        "clu>=0.0.12",
        "tensorboardX>=2.6",
        "ml-collections>=1.1",
        "safetensors>=0.5",
        "pyyaml>=6.0",
        "pillow>=11.0",
        "scikit-image>=0.25",
        "scipy>=1.14",
        "trimesh>=4.6",
        "fast-simplification>=0.1.11",
        "xatlas>=0.0.10",
        "embreex>=2.17.7",
        "imageio>=2.37",
        "imageio-ffmpeg>=0.6",
        "huggingface-hub>=0.30",
        "tqdm>=4.67",
        "jaxtyping>=0.3",
        "absl-py>=2.1",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "test": ["pytest>=8.3", "pytest-xdist>=3.6", "beartype>=0.20", "ruff>=0.9"],
        "background": ["rembg[cpu]>=2.0"],
        "torch": ["torch>=2.6", "transformers>=4.57"],
    },
    entry_points={"console_scripts": ["lrm = lrm_jax.__main__:main"]},
)
