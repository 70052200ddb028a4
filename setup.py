"""Which folder installs as which package; everything else is in pyproject.toml.

methods/, eval/ and prompts/ lie at the root, where people look for them, and install as erasure.methods, erasure.eval and
erasure.prompts. The links inside erasure/ make the same names work in an uninstalled checkout and for type checkers.
Packages are computed, so that a new folder cannot be forgotten; it needs an ``__init__.py``.
"""

from setuptools import find_packages, setup

MOUNTED = {"erasure.methods": "methods", "erasure.eval": "eval", "erasure.prompts": "prompts"}

packages = [p for p in find_packages(include=["erasure", "erasure.*"]) if not p.startswith(tuple(MOUNTED))]
for name, folder in MOUNTED.items():
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]

setup(packages=packages, package_dir={"erasure": "erasure", **MOUNTED})
