"""Coders that other tools trained: folders of EleutherAI's sparsify and of dictionary_learning."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from erasure.errors import ErasureError

from .coder import CONFIG, WEIGHTS, SparseCoder, SparseCoderConfig

SPARSIFY, DICTIONARY = "cfg.json", "ae.pt"
TOPK, RELU = ("AutoEncoderTopK",), ("AutoEncoder",)
"""Classes of dictionary_learning that a coder here can be."""


def is_coder(folder: Path) -> bool:
    """Whether a folder holds a coder of any of the formats."""
    return (folder / CONFIG).is_file() or (folder / SPARSIFY).is_file()


def load(folder: Path) -> SparseCoder:
    """A coder of any of the formats; the folder of a foreign one is named after its hookpoint, such as text_encoder.layers.8.

    sparsify has cfg.json and sae.safetensors, dictionary_learning config.json (with "trainer") and ae.pt, which is read without
    running code. Errors: transcoders, skip connections, grouped activations and other classes raise, since their sums are others.
    """
    try:
        if (folder / SPARSIFY).is_file():
            return _sparsify(folder, json.loads((folder / SPARSIFY).read_text(encoding="utf-8")))
        if (folder / DICTIONARY).is_file():
            return _dictionary(folder, json.loads((folder / CONFIG).read_text(encoding="utf-8"))["trainer"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ErasureError(f"{folder}: not a readable coder of another tool ({type(error).__name__}: {error})") from error
    return SparseCoder.load(folder)


def _sparsify(folder: Path, config: Mapping[str, Any]) -> SparseCoder:
    odd = [key for key in ("transcode", "skip_connection") if config.get(key)]
    if odd or config.get("activation", "topk") != "topk":
        what = odd[0] if odd else config["activation"]
        raise ErasureError(f"{folder}: a coder with {what} computes something else; give an autoencoder with topk")
    return _coder(folder, load_file(folder / WEIGHTS), int(config["k"]), "topk")


def _dictionary(folder: Path, trainer: Mapping[str, Any]) -> SparseCoder:
    kind = trainer["dict_class"]
    if kind not in TOPK + RELU:
        raise ErasureError(f"{folder}: {kind} of dictionary_learning is not known here; known are {', '.join(TOPK + RELU)}")
    found = torch.load(folder / DICTIONARY, map_location="cpu", weights_only=True)
    tensors = {name: found[name] for name in ("encoder.weight", "encoder.bias")}
    tensors |= {"W_dec": found["decoder.weight"].T, "b_dec": found["b_dec" if kind in TOPK else "bias"]}
    return _coder(folder, tensors, int(trainer["k"]) if kind in TOPK else 1, "topk" if kind in TOPK else "relu")


def _coder(folder: Path, tensors: Mapping[str, Tensor], k: int, activation: Any) -> SparseCoder:
    latents, width = tensors["encoder.weight"].shape
    hookpoint = folder.resolve().name
    if not hookpoint.startswith(("text_encoder", "unet.")):
        raise ErasureError(f"{folder} does not say what it codes: rename the folder to the hookpoint, such as text_encoder.layers.8")
    config = SparseCoderConfig(d_in=width, num_latents=latents, k=k, activation=activation, hookpoint=hookpoint)
    return SparseCoder.of(config, {name: tensor.contiguous() for name, tensor in tensors.items()})
