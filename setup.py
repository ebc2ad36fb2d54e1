"""Packaging. `pip install -e .` runs; `.[gpu]` or `.[tpu]` adds the accelerator; `.[test]` adds what the tests need.

Nothing here pulls in torch or TensorFlow. The tests compare with torch where it is installed; benchmarks/ runs the
peers it measures against, which `.[bench]` brings.
"""

from setuptools import find_packages, setup

setup(
  name="alma_jax",
  version="0.1.0",
  description="ALMA (arXiv 2412.04305) in JAX: from a Llama base model and a few labels to an aligned model",
  author="The alma_jax authors",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["alma_jax", "alma_jax.*", "configs", "configs.*"]),
  package_data={"alma_jax.mini": ["checkpoint/*"]},
  install_requires=[
    "jax>=0.10.2,!=0.11.1",
    "flax>=0.12.8",  # older ones do not import on jax 0.10
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",  # the v1 interface
    "ml_collections>=1.1",
    "absl-py",
    "numpy>=2",
    "transformers>=5",  # tokenizers only
    "sentencepiece",
    "safetensors",
    "pyarrow",
    "tensorflow-datasets>=4.9.9",  # users' data by name; works without TensorFlow
    "tensorboardX",
    "tqdm",
    "rapidfuzz>=3.9",  # ROUGE-L of near-duplicates
  ],
  extras_require={
    "gpu": ["jax[cuda12]"],  # brings CUDA; for a driver of 580 or newer, jax[cuda13] is the alternative
    "tpu": ["jax[tpu]"],
    "test": ["pytest", "pytest-xdist", "hypothesis", "scikit-learn", "jinja2", "ruff==0.17.5"],
    "bench": ["torch", "trl==1.16.0", "faiss-cpu", "scikit-learn", "datasketch"],
  },
)
