"""SAeUron: sparse features of a UNet block that fire for a concept, chosen for each timestep, and turned against it while sampling."""

from .eraser import SAeUron, SAeUronEraser
from .formulas import ablate, choose, deactivate, score

__all__ = ["SAeUron", "SAeUronEraser", "ablate", "choose", "deactivate", "score"]
