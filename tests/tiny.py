"""The tiny pipelines, which ship with the package so that other packages can check their methods on them."""

from erasure.testing.tiny import FAMILIES, T5_TOKENS, TOKENS, WORDS, flux, latents, sd1, sd2, sd3, sdxl, size_of, t5_tokenizer, tokenizer, wan

__all__ = ["FAMILIES", "T5_TOKENS", "TOKENS", "WORDS", "flux", "latents", "sd1", "sd2", "sd3", "sdxl", "size_of", "t5_tokenizer", "tokenizer", "wan"]
