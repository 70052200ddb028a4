"""AdvUnlearn: the text encoder learns to erase a concept against an attacker who looks for it in the space of token embeddings."""

from .attack import attack_step
from .method import AdvUnlearn

__all__ = ["AdvUnlearn", "attack_step"]
