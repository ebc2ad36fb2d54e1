"""The packages, and the home of `configs/` in a wheel; everything else about the package stands in pyproject.toml."""

from setuptools import find_packages, setup

# A wheel keeps configs/ inside the package, in alma_jax/shipped, where alma_jax/config_files.py finds it.
configs = find_packages(include=["configs", "configs.*"])

setup(
  packages=find_packages(include=["alma_jax", "alma_jax.*"]) + [f"alma_jax.shipped.{name}" for name in configs],
  package_dir={"alma_jax.shipped.configs": "configs"},
)
