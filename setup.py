"""Package definition; `requirements.lock` beside this file holds the exact versions."""

from pathlib import Path

from setuptools import find_packages, setup

# Folders at the top of the repository that a wheel carries inside the package, so that it puts no
# top-level name but its own into site-packages; robust_ft/bundled.py finds either.
BUNDLED = {f"robust_ft._bundled.{name}": name for name in ("gin_configs", "tasks", "launch")}

setup(
    name="robust_ft",
    version="0.2.0.dev0",
    description="Finetune language models in JAX without losing what they could already do.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["robust_ft*"]), *BUNDLED],
    package_dir=BUNDLED,
    package_data={"": ["py.typed", "assets/**/*", "**/*.gin", "*.sh"]},
    entry_points={"console_scripts": ["robust_ft = robust_ft.__main__:main"]},
    install_requires=[
        "array-record",
        "etils[epath]",
        "flax~=0.12",
        "fsspec",
        "gin-config",
        "grain",
        "huggingface-hub",
        "importlib-resources",  # tensorflow-datasets 4.9.10 imports it and does not say so
        "jax~=0.10.0",
        "jaxtyping",
        "jinja2",
        "matplotlib",
        "msgpack",
        "nltk",
        "numpy",
        "optax",
        "orbax-checkpoint~=0.12",
        "pyarrow",
        "pyyaml",
        "rich",
        "rouge-score",
        "sacrebleu",
        "safetensors",
        "scipy",
        "sentencepiece",
        "seqio",
        "tensorboard",
        "tensorflow-text",
        "tensorstore",
        "tokenizers",
    ],
    extras_require={
        "test": ["beartype", "hypothesis", "mypy", "pytest", "pytest-xdist", "ruff"],
        # Independent references for the tests; without them those tests are skipped.
        "parity": ["datasets", "pandas", "peft", "torch==2.13.0", "transformers~=5.0"],
        # The site of docs/, and what runs examples/tour.ipynb.
        "docs": ["ipykernel", "mkdocs", "mkdocs-material", "mkdocstrings[python]", "nbclient"],
        # MODEL_DIR=gs://BUCKET/FOLDER and s3://BUCKET/FOLDER.
        "gcs": ["gcsfs", "google-cloud-storage"],
        "s3": ["s3fs"],
        # Both, and what serves buckets to the tests; without it those tests are skipped.
        "buckets": [
            "flask",
            "flask-cors",
            "gcp-storage-emulator",
            "gcsfs",
            "google-cloud-storage",
            "moto[s3]",
            "s3fs",
        ],
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
    },
)
