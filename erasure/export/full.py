"""``full``: a diffusers folder that plain ``from_pretrained`` loads, in transformers 4 as well as 5."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ArtifactError
from ..families import family_of
from ..lora import ENCODER
from ..models import dtype_keyword
from ..seams import weights
from .folding import Notes


def write(new: Mapping[str, Tensor], pipe: Any, folder: Path) -> Notes:
    """Save the pipeline with the new weights in it."""
    with weights.swapped(pipe, new):
        pipe.save_pretrained(folder, safe_serialization=True)
    for encoder in family_of(pipe).encoders:
        if encoder.kind == "clip" and getattr(pipe, encoder.component) is not None:
            prefix_encoder(folder / encoder.component / "model.safetensors")
            plain_tokenizer(folder / encoder.tokenizer)
    if pickles := [p.name for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt")]:
        raise ArtifactError(f"a component of the pipeline saved itself as a pickle ({pickles[0]}); nothing was kept")
    missing = "" if getattr(pipe, "safety_checker", None) is not None else "\nThe base's safety checker is not in this folder.\n"
    usage = f"""```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER")  # nothing of erasure-suite is needed
```
{missing}"""

    @contextmanager
    def read_back() -> Iterator[Any]:
        options: dict[str, Any] = {dtype_keyword(): pipe.dtype, "use_safetensors": True}
        again = DiffusionPipeline.from_pretrained(str(folder), **options)
        yield again.to(pipe.device)

    return Notes(usage, {"model_index.json": read_back}, {"changed_tensors": len(new)})


def prefix_encoder(path: Path) -> None:
    """Give a CLIP text encoder's keys the prefix that transformers 4 needs: without, it loads random weights with only a warning.

    transformers 5, which writes CLIPTextModel without, reads both forms.
    """
    if not path.is_file():
        raise ArtifactError(f"{path.parent.name} was not saved as {path.name}; nothing was kept")
    save_file({file_key(key): tensor for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def file_key(key: str) -> str:
    """A CLIP text encoder's key as files have it."""
    return key if key.startswith((ENCODER, "text_projection.")) else f"{ENCODER}{key}"


def plain_tokenizer(folder: Path) -> None:
    """Write vocab.json and merges.txt beside tokenizer.json: transformers 4 reads CLIP's tokenizer from those."""
    source = folder / "tokenizer.json"
    if not source.is_file() or (folder / "vocab.json").exists():
        return
    model = json.loads(source.read_text(encoding="utf-8"))["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
