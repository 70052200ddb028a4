"""What the evaluating verbs print."""

import json as jsonlib
import logging
from pathlib import Path
from typing import Any


def chatty(json: bool) -> bool:
    """Whether to show progress: neither beside JSON nor with --quiet."""
    return not json and logging.getLogger("erasure").isEnabledFor(logging.WARNING)


def show(table: Any, folder: Path, json: bool, grid: bool = False) -> None:
    """A comparison on the terminal, or as JSON."""
    from rich.console import Console

    from erasure.eval import tables

    if json:
        print(tables.to_json(table))
        return
    console = Console()
    console.print(tables.to_rich(table, width=console.width))
    console.print(f"report: {folder / 'report.html'}", highlight=False, markup=False)
    if grid:
        console.print(f"grid:   {folder / 'grid.png'}", highlight=False, markup=False)


def plan(run: Any, rows: int, json: bool) -> None:
    """What a run would cost, from one timed batch; nothing is written."""
    from erasure.eval.generate import estimate, seconds_per_image

    seconds = seconds_per_image(run.pipe, run.rows[: run.batch_size], run.suite.protocol)
    cost = estimate(rows * len(run.rows), seconds, run.suite.protocol)
    record = {"concept": run.concept.name, "images": cost.images, "minutes": round(cost.minutes, 1), "megabytes": round(cost.megabytes, 1)}
    print(
        jsonlib.dumps(record)
        if json
        else ", ".join(f"{key}: {value}" for key, value in record.items()) + " (methods may be slower than the base)"
    )
