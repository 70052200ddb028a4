"""An evaluation's table and metadata in the model card of its artefact."""

from pathlib import Path
from typing import Any

from erasure import artifact
from erasure.card import with_results

from . import tables
from .compare import Comparison, Line


def update(folder: Path, table: Comparison, name: str) -> Path:
    """Write the base's row and the artefact's into its README.md, in the place of an earlier evaluation on the same suite."""
    line = next(line for line in table.lines if line.name == name)
    suite = table.suite
    place = f"{suite['name']}-{table.concept['name']}".replace(" ", "-")
    return artifact.rewrite_card(folder, lambda card: with_results(card, place, tables.to_markdown(table), _model_index(line)))


def _model_index(line: Line) -> dict[str, Any]:
    """One result of the hub's model-index: every number of the row, with its interval in the name."""
    results = line.entry.results
    suite, protocol = results["suite"], results["protocol"]
    metrics = []
    for key, cell in line.cells.items():
        if cell.value is not None:
            interval = f" (95 % {cell.lo:.4g} to {cell.hi:.4g})" if cell.lo is not None and cell.hi is not None else ""
            n = f", n={cell.n}" if cell.n else ""
            metrics.append({"type": key, "name": _title(line, key) + interval + n, "value": cell.value, "verified": False})
    return {
        "task": {"type": "text-to-image"},
        "dataset": {
            "name": f"{suite['name']} v{suite['version']}, erasing {results['concept']['name']}",
            "type": suite["name"],
            "config": results["concept"]["name"],
            "args": {"suite_hash": suite["hash"], "protocol_hash": protocol["hash"], "images": results["n"]},
        },
        "metrics": metrics,
    }


def _title(line: Line, key: str) -> str:
    return next(column.title for column in line.columns if column.key == key)
