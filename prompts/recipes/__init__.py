"""Recipes of published rates, one file each; ``erasure.eval.recipes`` reads them, and a frozen list of hashes guards them."""
