"""Erase concepts from diffusers pipelines, ship what was fitted, and measure what it did."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import detach, erase, list_methods, load, verify
    from .concept import Concept
    from .method import Eraser, ErasureMethod, Run, compose
    from .models import load_base

_LAZY = {
    "Concept": "concept",
    "Eraser": "method",
    "ErasureMethod": "method",
    "Run": "method",
    "compose": "method",
    "detach": "api",
    "erase": "api",
    "list_methods": "api",
    "load": "api",
    "load_base": "models",
    "verify": "api",
}
__all__ = ["Concept", "Eraser", "ErasureMethod", "Run", "compose", "detach", "erase", "list_methods", "load", "load_base", "verify"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``erasure --help`` does not wait for torch."""
    if name not in _LAZY:
        raise AttributeError(f"module 'erasure' has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
