"""SAFREE: training-free erasure by projecting prompts off the concept's subspace, with latent re-attention."""

from .eraser import SAFREE, SafreeEraser
from .formulas import filter_steps, project, projector, reattend, trigger_mask

__all__ = ["SAFREE", "SafreeEraser", "filter_steps", "project", "projector", "reattend", "trigger_mask"]
