"""The model card of an artefact."""

from collections.abc import Mapping
from typing import Any

from .registry import methods


def model_card(config: Mapping[str, Any]) -> str:
    """README.md of an artefact folder, with the metadata that model hubs read."""
    names = ", ".join(c["name"] for c in config["concepts"])
    fields = "\n".join(f"| `{k}` | {v} |" for k, v in config["method_config"].items()) or "| – | – |"
    canary = config["canary"]
    paper = getattr(methods.get(config["method"]), "paper", "")
    return f"""---
base_model: {config["base"]["id"]}
library_name: diffusers
tags: [concept-erasure, {config["method"]}]
---
# {names}, erased from {config["base"]["id"]} by {config["method"]}

Not a model of its own: it changes the base, whose licence applies, and loads only onto it.

```python
import erasure
pipe = erasure.load("THIS_FOLDER", base="{config["base"]["id"]}")  # an ordinary diffusers pipeline; raises if it would not be erased
```

**Intended use.** Keep the base from making: {", ".join(t for c in config["concepts"] for t in c["targets"])}.
**Known limits.** No eraser is proof against every prompt or attack, and neighbours of a concept can suffer; measure yours with
`erasure evaluate THIS_FOLDER --suite …` before you ship.

| field | value |
|---|---|
| method | {config["method"]} {f"({paper})" if paper else ""} |
| kind | {config["kind"]} |
| fit seed | {config["seed"]} |
| canary | {canary["prompt"]!r}: latents move by {canary["delta"]:.1%} of the base's norm |
| created | {config["created"]} |

| setting | value |
|---|---|
{fields}
"""


def export_card(config: Mapping[str, Any], form: str, usage: str) -> str:
    """README.md of an export."""
    names = ", ".join(c["name"] for c in config["concepts"])
    return f"""---
base_model: {config["base"]["id"]}
library_name: diffusers
tags: [concept-erasure, {config["method"]}]
---
# {names}, erased from {config["base"]["id"]} by {config["method"]} ({form})

Made by `erasure export --format {form}`; the base's licence applies.

{usage}
**Known limits.** No eraser is proof against every prompt or attack, and neighbours of a concept can suffer; measure before you ship.
`erasure_config.json` has method, settings, concepts, the base's fingerprint, and the sha256 of every file here.
"""
