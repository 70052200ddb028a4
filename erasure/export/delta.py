"""``delta``: new minus old, for whoever has the base and plain torch."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..seams import weights
from .folding import Notes, change

SNIPPET = """import torch
from safetensors.torch import load_file
for name, delta in load_file("delta.safetensors").items():
    part, _, path = name.partition(".")
    weights = {key.removeprefix("text_model."): p for key, p in getattr(pipe, part).named_parameters()}
    weights[path.removeprefix("text_model.")].data.add_(delta.to(weights[path.removeprefix("text_model.")]))
"""
"""Applies a delta to ``pipe``; transformers 4 and 5 name text encoders' weights with and without the prefix."""


def identity(config: Mapping[str, Any]) -> dict[str, str]:
    """Header of a file of weights: what was erased from what."""
    base = {key: config["base"][key] for key in ("family", "components")}
    return {
        "format": "pt",
        "erasure_method": config["method"],
        "erasure_concepts": json.dumps([concept["name"] for concept in config["concepts"]], ensure_ascii=False),
        "base_model": config["base"]["id"],
        "base_fingerprint_sha256": hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest(),
    }


def write(new: dict[str, Tensor], pipe: Any, folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> Notes:
    """Write the change of the weights."""
    changes = change(new, pipe)
    path = folder / "delta.safetensors"
    save_file({key: tensor.to(dtype).contiguous() for key, tensor in changes.items()}, path, metadata=identity(config))
    usage = f"""Add it to the base, which has to be the very one (its fingerprint is in the header and in erasure_config.json):

```python
{SNIPPET}```
"""

    @contextmanager
    def read_back() -> Iterator[Any]:
        added = {key: weights.parameter(pipe, key).detach().cpu().float() + tensor.float() for key, tensor in load_file(path).items()}
        with weights.swapped(pipe, added):
            yield pipe

    return Notes(usage, {path.name: read_back}, {"changed_tensors": len(changes)})
