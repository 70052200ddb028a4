"""Base models: the embedded canvas, a hub id, a diffusers folder, or a single .safetensors checkpoint."""

import inspect
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from .errors import ErasureError

EMBEDDED = {"canvas": "weights/canvas"}


def load_base(model: str, *, device: str | None = None, dtype: str | torch.dtype = "float32", base_config: str | None = None) -> Any:
    """A diffusers pipeline of ``model``, on ``device`` (cuda where there is one, else cpu), safetensors only, no safety checker.

    ``base_config``: folder with the configuration files of a single-file checkpoint, which diffusers would fetch from the hub.
    The safety checker is left out because it would hide what a method does; ship with it on.
    """
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise ErasureError(f"no dtype {dtype!r}; try float32, float16 or bfloat16")
    options: dict[str, Any] = {"use_safetensors": True, _dtype_keyword(): torch_dtype}
    if model in EMBEDDED:
        pipe = DiffusionPipeline.from_pretrained(str(files("erasure.canvas").joinpath(EMBEDDED[model])), **options)
    elif model.endswith(".safetensors"):
        if not Path(model).is_file():
            raise ErasureError(f"no checkpoint file {model}")
        if base_config is None:
            raise ErasureError(
                f"{model} holds weights alone; give its configuration folder with --base-config (a diffusers folder of the same model)"
            )
        pipe = StableDiffusionPipeline.from_single_file(model, config=base_config, local_files_only=True, **options)
    elif model.endswith((".ckpt", ".pt", ".bin", ".pth")):
        raise ErasureError(f"{model} is a pickle, which can run code when it is read; convert it to .safetensors")
    else:
        try:
            pipe = DiffusionPipeline.from_pretrained(model, **options)
        except (OSError, ValueError) as error:
            raise ErasureError(f"cannot load {model!r} (an embedded model is one of: {', '.join(EMBEDDED)}): {error}") from error
    if "safety_checker" in inspect.signature(type(pipe).__init__).parameters and pipe.safety_checker is not None:
        pipe.safety_checker = None
        pipe.register_to_config(requires_safety_checker=False)
    return pipe.to(device)


def _dtype_keyword() -> str:
    """diffusers 0.42 renamed ``torch_dtype``."""
    major, minor = version("diffusers").split(".")[:2]
    return "dtype" if (int(major), int(minor)) >= (0, 42) else "torch_dtype"
