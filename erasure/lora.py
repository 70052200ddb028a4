"""LoRA factors by the keys of diffusers' files: read, write, and take from a pipeline."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .errors import ErasureError, NothingAttached

LORA = "pytorch_lora_weights.safetensors"
"""The file that ``pipe.load_lora_weights(folder)`` looks for."""
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps LoRA configurations in that file's header."""
KEY = re.compile(r"(?P<component>(?:unet|transformer|text_encoder)(?:_\d)?)\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
ENCODER = "text_model."
"""Prefix of CLIP text encoders' layers in files; transformers 5 has dropped it from CLIPTextModel itself."""

Factors = dict[str, dict[str, Tensor]]
"""Layer name -> "A" [r, in, ...] and "B" [out, r, ...]."""


def by_component(factors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Factors by component and layer; a key that diffusers would skip with only a warning raises."""
    parts: dict[str, Factors] = {}
    for key, tensor in factors.items():
        match = KEY.fullmatch(key)
        if match is None or tensor.ndim < 2:
            raise ErasureError(
                f"{key!r} is no LoRA tensor of a diffusers file, where names begin with the component: unet.<layer>.lora_A.weight"
            )
        parts.setdefault(match["component"], {}).setdefault(match["layer"], {})[match["side"]] = tensor
    return parts


def settings(layers: Factors) -> dict[str, Any]:
    """The LoraConfig of one component: alpha is the rank everywhere, and no other layer is named, however alike its name."""
    ranks = {layer.removeprefix(ENCODER): len(pair["A"]) for layer, pair in sorted(layers.items())}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    encoder = any(layer.startswith(ENCODER) for layer in layers)
    start = rf"({re.escape(ENCODER)})?" if encoder else ""
    others = {f"^{start}{re.escape(layer)}": r for layer, r in ranks.items() if r != rank}
    targets = f"{start}({'|'.join(re.escape(layer) for layer in ranks)})"
    return {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": dict(others), "target_modules": targets}


def metadata(factors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the file's header says, by component: it follows from the factors alone."""
    return {f"{component}.{key}": value for component, layers in by_component(factors).items() for key, value in settings(layers).items()}


def write(factors: Mapping[str, Tensor], folder: Path, name: str = LORA) -> Path:
    """Write factors as a file that ``pipe.load_lora_weights`` reads."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    contiguous = {key: tensor.contiguous() for key, tensor in factors.items()}
    LoraBaseMixin.write_lora_layers(contiguous, str(folder), True, name, None, True, metadata(factors))  # type: ignore[arg-type]
    return folder / name


def check_metadata(path: Path, factors: Mapping[str, Tensor]) -> None:
    """Raise unless plain diffusers would load the file as the eraser does."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found = (file.metadata() or {}).get(METADATA)
    try:
        same = found is not None and json.loads(found) == metadata(factors)
    except ValueError:
        same = False
    if not same:
        raise ErasureError(f"{path.name}: its header describes other LoRA layers, ranks or alphas than the file holds")


def collect(pipe: Any, adapter: str) -> dict[str, Tensor]:
    """The factors of an adapter that is loaded in ``pipe`` (after training it there, say), alpha / r multiplied into B."""
    from peft import get_peft_model_state_dict

    factors = {}
    for component in pipe._lora_loadable_modules:
        module = getattr(pipe, component, None)
        if module is None or adapter not in getattr(module, "peft_config", {}):
            continue
        scales = {name: layer.scaling[adapter] for name, layer in module.named_modules() if adapter in getattr(layer, "scaling", {})}
        for key, tensor in get_peft_model_state_dict(module, adapter_name=adapter).items():
            layer, _, side = key.removesuffix(".weight").rpartition(".")
            scale = scales[layer] if side == "lora_B" else 1.0
            factors[f"{component}.{file_name(component, layer)}.{side}.weight"] = (scale * tensor.detach()).cpu()
    if not factors:
        raise NothingAttached(f"the pipeline has no adapter {adapter!r}; it has {pipe.get_list_adapters() or 'none'}")
    return factors


def file_name(component: str, layer: str) -> str:
    """A layer's name in files: as in the model, with the prefix that CLIP text encoders had up to transformers 4."""
    bare = component.startswith("text_encoder") and not layer.startswith(ENCODER) and layer.startswith("encoder.layers.")
    return f"{ENCODER}{layer}" if bare else layer


def live_name(module: nn.Module, layer: str) -> str:
    """A layer's name in the model that is loaded."""
    return layer if hasattr(module, "text_model") else layer.removeprefix(ENCODER)
