"""Artefacts in the forms that other tools load: a diffusers folder, a delta, a LoRA, a single checkpoint. Each is checked after writing."""

from .run import FORMATS, Options, export, plan

__all__ = ["FORMATS", "Options", "export", "plan"]
