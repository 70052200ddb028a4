"""Columns for whatever recipes and metrics some results hold: their names are not known beforehand, and neither are their identities."""

from collections.abc import Callable, Sequence
from typing import Any

from .columns import Cell, Column, Results, find, points, rate_cell

UNITS = {"image": "share of images", "prompt": "share of prompts", "part": "findings summed over all images"}


def columns(results: Sequence[Results]) -> tuple[Column, ...]:
    """A column for each recipe and metric, and for refusals where benign prompts were asked; the first row to have one sets its identity.

    A cell that was made under the same name by another recipe, detector file, reference or model is marked ≠.
    """
    recipes = {name: (r, f"recipes.{name}") for row in reversed(results) for name, r in row["recipes"].items()}
    metrics = {name: (m, f"metrics.{name}") for row in reversed(results) for name, m in row["metrics"].items()}
    found = [column for name in _order(results, "recipes") for column in _recipe(name, *recipes[name])]
    found += [column for name in _order(results, "metrics") for column in _metric(name, *metrics[name])]
    if any(row["over_refusal"] for row in results):
        found += _refusals()
    return tuple(found)


def identity(kind: str, record: dict[str, Any]) -> Any:
    """What two records of a "recipe" or "metric" must share; versions of the software that ran it may differ, and are in the results."""
    if kind == "recipe":
        return record["hash"], record["detectors"]
    return _plain(record["identity"])


def _plain(value: Any) -> Any:
    return {key: _plain(part) for key, part in value.items() if key != "backend"} if isinstance(value, dict) else value


def _order(results: Sequence[Results], key: str) -> list[str]:
    return list(dict.fromkeys(name for row in results for name in row[key]))


def _recipe(name: str, first: dict[str, Any], path: str) -> list[Column]:
    parts = first["unit"] == "part"
    said = f"Recipe {name} ({first['hash']}): {UNITS[first['unit']]} that it calls unsafe; refused images are left out."
    shown = _checked("recipe", first, path, _parts_cell if parts else lambda r: rate_cell(r["rate"]))
    change = _checked("recipe", first, path, lambda r: _points_cell(find(r, "rate.difference")))
    less = f"Share of images with a finding by recipe {name}, less the base's, in points, paired on prompts and seeds."
    return [
        Column(f"recipe:{name}", f"{name} parts" if parts else name, "down", said, shown),
        Column(f"recipe:{name}:difference", f"{name} - base", "down", less, change),
    ]


def _metric(name: str, first: dict[str, Any], path: str) -> list[Column]:
    better = first.get("better", "")
    about = f"Metric {name}" + (f", n = {first['n']} in the first row that has it" if first["interval"] == "none" else "")
    shown = _checked("metric", first, path, lambda r: _mean_cell(r, signed=False))
    change = _checked("metric", first, path, lambda r: _mean_cell(r.get("difference"), signed=True))
    less = f"Metric {name}, less the base's on the same prompts and seeds: mean of the paired differences."
    return [
        Column(f"metric:{name}", name, better, f"{about}; its identity is in results.json.", shown),
        Column(f"metric:{name}:difference", f"{name} - base", better, less, change),
    ]


def _refusals() -> list[Column]:
    path = "over_refusal.refused"
    return [
        Column("refused", "refused", "down", "Benign prompts: share that got a black image.", lambda r: rate_cell(find(r, path))),
        Column(
            "refused:difference",
            "refused - base",
            "down",
            "The refused share less the base's, in points, on the same prompts and seeds.",
            lambda r: _points_cell(find(r, f"{path}.difference")),
        ),
    ]


def _checked(kind: str, first: dict[str, Any], path: str, cell: Callable[[Any], Cell]) -> Callable[[Results], Cell]:
    group, _, name = path.partition(".")  # a name may hold dots

    def checked(results: Results) -> Cell:
        record = results[group].get(name)
        if record is None:
            return Cell()
        return cell(record).marked() if identity(kind, record) != identity(kind, first) else cell(record)

    return checked


def _parts_cell(record: dict[str, Any]) -> Cell:
    parts = record["parts"]
    if parts is None:
        return Cell()
    interval = f"{parts['lo']:.2f}-{parts['hi']:.2f} an image"
    n = None if record["rate"] is None else record["rate"]["n"]
    return Cell(str(parts["total"]), interval, parts["total"], parts["lo"] * (n or 1), parts["hi"] * (n or 1), n)


def _points_cell(difference: dict[str, Any] | None) -> Cell:
    if difference is None:
        return Cell()
    value, lo, hi = (difference[key] for key in ("value", "lo", "hi"))
    return Cell(points(value), f"{points(lo)} to {points(hi)}", value, lo, hi, difference.get("n"))


def _mean_cell(record: dict[str, Any] | None, *, signed: bool) -> Cell:
    if record is None:
        return Cell()
    form = "{:+.4g}" if signed else "{:.4g}"
    value, lo, hi = (record[key] for key in ("value", "lo", "hi"))
    interval = "" if lo is None else f"{form.format(lo)} to {form.format(hi)}"
    return Cell(form.format(value), interval, value, lo, hi, record["n"])
