"""ALMA (arXiv 2412.04305) in JAX: a Llama base model and a few thousand labels become an aligned model."""

__version__ = "0.2.0"
