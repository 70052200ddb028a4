"""Sparse autoencoders: the coder, where it reads, and how it is trained."""

from .coder import Coded, SparseCoder, SparseCoderConfig, abstopk, topk

__all__ = ["Coded", "SparseCoder", "SparseCoderConfig", "abstopk", "topk"]
