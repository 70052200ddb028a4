"""What the evaluating verbs print."""

import json as jsonlib
from pathlib import Path
from typing import Any

from rich.console import Console


def show(table: Any, folder: Path, json: bool, grid: bool = False) -> None:
    """A comparison on the terminal, or as JSON."""
    from erasure.eval import tables

    if json:
        print(tables.to_json(table))
        return
    console = Console()
    console.print(tables.to_rich(table))
    console.print(f"report: {folder / 'report.html'}", highlight=False)
    if grid:
        console.print(f"grid:   {folder / 'grid.png'}", highlight=False)


def plan(run: Any, rows: int, json: bool) -> None:
    """What a run would cost, from its images so far or one timed batch."""
    from erasure.eval.generate import estimate, seconds_per_image

    seconds = seconds_per_image(run.pipe, run.rows[: run.batch_size], run.suite.protocol)
    cost = estimate(rows * len(run.rows), seconds, run.suite.protocol)
    record = {"concept": run.concept.name, "images": cost.images, "minutes": round(cost.minutes, 1), "megabytes": round(cost.megabytes, 1)}
    print(
        jsonlib.dumps(record)
        if json
        else ", ".join(f"{key}: {value}" for key, value in record.items()) + " (methods may be slower than the base)"
    )
