"""Installation: `pip install .`; extras: below."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Folders beside the package that an installation has inside it; config/find.py finds both.
SHIPPED = {"dopsd_jax.configs": "configs", "dopsd_jax.examples": "examples"}
DOCS = ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30"]  # the site: mkdocs.yml

setup(
    name="dopsd_jax",
    version=re.search('__version__ = "(.+)"', (HERE / "dopsd_jax/__init__.py").read_text())[1],
    description="D-OPSD: tunes few-step image models without losing the few steps, in JAX/Flax",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="dopsd_jax developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["dopsd_jax", "dopsd_jax.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "dopsd_jax": ["py.typed"],
        "dopsd_jax.data": ["prompts/*.txt"],
        "dopsd_jax.reporting": ["page/*"],
        "dopsd_jax.examples": ["miniature/**/*", "klein_miniature/**/*"],
    },
    entry_points={
        "console_scripts": ["dopsd-jax = dopsd_jax.__main__:main"],
        "dopsd_jax.judges": ["miniature = dopsd_jax.miniature.data_judge:of_folder"],
    },
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8; python_version < '3.12'",
        "flax>=0.12.9; python_version >= '3.12'",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "ml_collections>=1.1.0",
        "transformers>=5.23",
        "numpy>=2.0",
        "scipy",  # JAX needs it too
        "pillow>=11.3",
        "absl-py",
        "etils[epath]",
        "huggingface_hub>=1.0",
        "jaxtyping",
        "safetensors>=0.5",
    ],
    extras_require={
        # The libraries that the tests compare with; exact, because they are the reference.
        "test": [
            "pytest>=8",
            "pytest-xdist",
            "torch==2.13.0",
            "diffusers==0.42.1",
            "transformers==5.23.0",
            "peft==0.21.2",
            "accelerate",
            "qwix>=0.1.8",
            "pyarrow>=17",
            "pillow-heif>=1",
            "hypothesis>=6",
            "tensorboardX>=2.6",
            "gradio>=6",
            "beartype>=0.22",  # checks the shapes in the annotations: tests/conftest.py
            *DOCS,
            "nbclient>=0.10",  # runs examples/notebook.ipynb
            "ipykernel>=6",
            "matplotlib",  # draws the figures of benchmarks/paper.py
            "ruff==0.17.6",  # as .pre-commit-config.yaml and .ci/run have it
        ],
        "eval": ["torch"],  # dopsd_jax.evaluate on real data sets: CLIP-S, DINO-D, LPIPS-D
        "quant": ["qwix>=0.1.8"],  # config.base_dtype int8, nf4, fp8
        "parquet": ["pyarrow>=17"],  # data sets of Hugging Face as .parquet files
        "heic": ["pillow-heif>=1"],  # pictures of phones
        "ui": ["gradio>=6"],  # dopsd_jax.serve
        "gcs": ["gcsfs"],  # gs:// paths
        "tensorboard": ["tensorboardX>=2.6"],  # config.trackers, as is wandb
        "wandb": ["wandb>=0.19"],
        "docs": DOCS,
        "bench": ["matplotlib"],  # figures of benchmarks/paper.py
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
    },
)
