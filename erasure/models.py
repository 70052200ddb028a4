"""Base models: the embedded canvas, a hub id, a diffusers folder, or a single .safetensors checkpoint."""

import inspect
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .errors import ErasureError
from .registry import unknown

EMBEDDED = {"canvas": "weights/canvas", "canvas-flow": "weights/canvas-flow"}
PICKLES = (".ckpt", ".pt", ".bin", ".pth")


def load_base(model: str, *, device: str | None = None, dtype: str | torch.dtype = "float32", base_config: str | None = None) -> Any:
    """A diffusers pipeline of ``model``, on ``device`` (cuda where there is one, else cpu), safetensors only, no safety checker.

    ``base_config``: folder with the configuration files of a single-file checkpoint, which diffusers would fetch from the hub.
    The safety checker is left out because it would hide what a method does; ship with it on.
    """
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    _check_name(model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise ErasureError(f"no dtype {dtype!r}; try float32, float16 or bfloat16")
    options: dict[str, Any] = {"use_safetensors": True, dtype_keyword(): torch_dtype}
    if model in EMBEDDED:
        pipe = DiffusionPipeline.from_pretrained(str(files("erasure.canvas").joinpath(EMBEDDED[model])), **options)
        if hasattr(pipe, "default_sample_size"):  # FLUX's pipeline has that of its first checkpoint, whatever it loads
            pipe.default_sample_size = pipe.vae.config.sample_size // pipe.vae_scale_factor
    elif model.endswith(".safetensors"):
        if not Path(model).is_file():
            raise ErasureError(f"no checkpoint file {model}; check the path")
        if base_config is None:
            raise ErasureError(
                f"{model} holds weights alone; give its configuration folder with --base-config (a diffusers folder of the same model)"
            )
        if not Path(base_config).is_dir():
            raise ErasureError(f"--base-config {base_config} is no folder; give a diffusers folder of the same model")
        try:
            pipe = StableDiffusionPipeline.from_single_file(model, config=base_config, local_files_only=True, **options)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ErasureError(f"cannot load {model} with the configuration of {base_config}: {error}") from error
    else:
        try:
            pipe = DiffusionPipeline.from_pretrained(model, **options)
        except (OSError, ValueError, SafetensorError) as error:
            raise ErasureError(
                f"cannot load {model!r}: {error} (give an embedded model: {', '.join(EMBEDDED)}; a hub id; or a diffusers folder "
                "with weights in .safetensors)"
            ) from error
    if "safety_checker" in inspect.signature(type(pipe).__init__).parameters and pipe.safety_checker is not None:
        pipe.safety_checker = None
        pipe.register_to_config(requires_safety_checker=False)
    return pipe.to(device)


def _check_name(model: str) -> None:
    """Raise for what is neither embedded, nor a file or folder, nor could be a hub id (owner/name)."""
    if model.endswith(PICKLES):
        raise ErasureError(f"{model} is a pickle, which can run code when it is read; convert it to .safetensors")
    if model in EMBEDDED or model.endswith(".safetensors"):
        return
    path = Path(model)
    if path.is_file():
        raise ErasureError(f"{model} is a file of a kind that is not read; give a .safetensors checkpoint or a diffusers folder")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ErasureError(f"{model} is no diffusers folder: it has no model_index.json; give the folder that save_pretrained wrote")
    if not path.is_dir() and (model.count("/") != 1 or model.startswith(("/", ".", "~")) or model.endswith("/")):
        raise unknown("model", model, EMBEDDED, "or a hub id (owner/name), an existing diffusers folder, or a .safetensors checkpoint")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ErasureError(f"no device {device!r} here ({reason}); leave --device out, or try cpu") from error


def dtype_keyword() -> str:
    """diffusers 0.42 renamed ``torch_dtype``."""
    major, minor = version("diffusers").split(".")[:2]
    return "dtype" if (int(major), int(minor)) >= (0, 42) else "torch_dtype"
