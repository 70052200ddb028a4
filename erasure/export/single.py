"""``single``: one checkpoint by the names of the original releases, which web UIs and ``from_single_file`` read."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UnsupportedFamily
from ..families import family_of
from ..models import dtype_keyword
from ..seams import weights
from .delta import identity
from .folding import Notes
from .full import plain_tokenizer
from .original import checkpoint

FAMILIES = ("sd1", "sd2", "sdxl")


def check_family(family: str) -> None:
    """Raise for families that have no single-file form here."""
    if family not in FAMILIES:
        raise UnsupportedFamily(
            f"single checkpoints are written for {', '.join(FAMILIES)}, not for {family}; use --format full, delta or lora"
        )


def write(new: Mapping[str, Tensor], pipe: Any, folder: Path, name: str, config: Mapping[str, Any], dtype: torch.dtype) -> Notes:
    """Write the checkpoint, and beside it the configuration files that ``from_single_file`` would fetch from the hub."""
    path = folder / f"{name}.safetensors"
    with weights.swapped(pipe, new):
        tensors = checkpoint(pipe, family_of(pipe).name, dtype)
    save_file(tensors, path, metadata=identity(config))
    _write_configs(pipe, folder / "config")
    usage = f"""For web UIs: `{path.name}`, in the folder of checkpoints. In diffusers:

```python
from diffusers import {type(pipe).__name__}
pipe = {type(pipe).__name__}.from_single_file("THIS_FOLDER/{path.name}", config="THIS_FOLDER/config", local_files_only=True)
```
"""
    if pipe.scheduler.config.get("prediction_type") == "v_prediction":
        usage += "\nThe model predicts v: web UIs that do not see that by themselves need the base's .yaml beside the file.\n"

    @contextmanager
    def read_back() -> Iterator[Any]:
        options: dict[str, Any] = {"config": str(folder / "config"), "local_files_only": True, dtype_keyword(): pipe.dtype}
        yield type(pipe).from_single_file(str(path), **options).to(pipe.device)

    return Notes(usage, {path.name: read_back}, {"tensors": len(tensors)})


def _write_configs(pipe: Any, folder: Path) -> None:
    """A diffusers folder without weights."""
    pipe.save_config(folder)
    for name, component in pipe.components.items():
        if hasattr(component, "save_config"):
            component.save_config(folder / name)
        elif hasattr(component, "config"):
            component.config.save_pretrained(folder / name)
        elif component is not None and hasattr(component, "save_pretrained"):
            component.save_pretrained(folder / name)
    for encoder in family_of(pipe).encoders:
        plain_tokenizer(folder / encoder.tokenizer)
