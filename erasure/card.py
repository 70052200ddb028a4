"""The model card of an artefact."""

from collections.abc import Mapping
from typing import Any

import yaml

from .errors import ErasureError
from .registry import methods

BEGIN, END = "<!-- erasure results {} -->", "<!-- end of erasure results {} -->"
"""Around a table that an evaluation wrote, with the name of its place."""


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
{_details(config.get("details", {}))}"""


def _details(details: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The tables that an eraser has of itself."""
    found = ""
    for title, table in details.items():
        columns = list(next(iter(table.values())))
        rows = "\n".join(f"| {row} | {' | '.join(str(values.get(c, '–')) for c in columns)} |" for row, values in table.items())
        found += f"\n**{title}**\n\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n{rows}\n"
    return found


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


def with_results(card: str, place: str, table: str, index: Mapping[str, Any]) -> str:
    """A card with a table between the markers of ``place``, and ``index`` among the results of its model-index metadata.

    What an earlier evaluation put into the same place, or under the same dataset, is replaced; all else stays as it is. Raises
    ErasureError for a card whose metadata or markers cannot be read.
    """
    parts = card.split("---\n", 2)
    try:
        meta = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except yaml.YAMLError as error:
        raise ErasureError(f"README.md has metadata that is not YAML ({error}): correct it, or save the artefact again") from error
    if not isinstance(meta, dict):
        raise ErasureError("README.md does not begin with metadata between two lines of ---: save the artefact again")
    body, begin, end = parts[2], BEGIN.format(place), END.format(place)
    if body.count(begin) != body.count(end) or body.count(begin) > 1:
        raise ErasureError(f"README.md has the markers of {place} not as a pair: remove what is left of them")
    section = f"{begin}\n## Measured\n\n{table.strip()}\n\n{end}"
    if begin in body:
        before, rest = body.split(begin)
        body = before + section + rest.split(end)[1]
    else:
        body = f"{body.rstrip()}\n\n{section}\n"
    name = next((line[2:] for line in body.splitlines() if line.startswith("# ")), "eraser")
    known = [r for entry in meta.get("model-index", []) for r in entry.get("results", []) if _dataset(r) != _dataset(index)]
    meta["model-index"] = [{"name": name, "results": sorted([*known, dict(index)], key=lambda r: str(_dataset(r)))}]
    return f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True, width=1000)}---\n{body}"


def _dataset(result: Mapping[str, Any]) -> tuple[Any, Any]:
    return result["dataset"]["type"], result["dataset"].get("config")
