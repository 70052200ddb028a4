"""Encodings of single phrases by one of a pipeline's text encoders, as the pipeline itself makes them."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encode(encoder: Any, tokenizer: Any, phrase: str) -> tuple[Tensor, int]:
    """Last hidden states [tokens, dim] of a phrase padded to full length, and how many tokens are BOS, words and EOS."""
    batch = tokenizer(phrase, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt")
    states = encoder(batch.input_ids.to(encoder.device)).last_hidden_state[0]
    return states.float(), int(batch.attention_mask.sum())


@torch.no_grad()
def pooled(encoder: Any, ids: Tensor, batch: int = 256) -> Tensor:
    """End-token states [n, dim] of unpadded token ids [n, tokens], each row ending in its end token.

    Taken at the last place, not by ``pooler_output``: that one stops at the first end token, which a prompt may hold as text.
    """
    return torch.cat([encoder(part.to(encoder.device)).last_hidden_state[:, -1].float() for part in ids.split(batch)])
