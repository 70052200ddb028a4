"""Neuron masking: gates on heads, neurons and norms, trained through the whole sampler and folded into the weights."""

from .eraser import MaskEraser, shares
from .formulas import closed, hard_concrete
from .minimalist import Minimalist

__all__ = ["MaskEraser", "Minimalist", "closed", "hard_concrete", "shares"]
