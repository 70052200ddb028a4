"""The columns of every table: title, direction, plain explanation, and how a results.json becomes a cell."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

Results = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What a table shows: a value, its 95 % interval, and the numbers behind them (None where nothing was measured)."""

    text: str = "-"
    interval: str = ""
    value: float | None = None
    lo: float | None = None
    hi: float | None = None
    n: int | None = None
    differs: bool = False
    """Measured another way than the column's first value, and never ranked with it."""

    def marked(self) -> "Cell":
        """The same, with the mark of another measurement."""
        return replace(self, text=f"≠ {self.text}", differs=True)


@dataclass(frozen=True)
class Column:
    """One column: ``cell`` reads it from results; ``better`` is "down", "up" or "" where neither end is good."""

    key: str
    title: str
    better: str
    help: str
    cell: Callable[[Results], Cell]

    @property
    def heading(self) -> str:
        return self.title + {"down": " ↓", "up": " ↑", "": ""}[self.better]


def find(results: Results, path: str) -> Any:
    """A value by its dotted path, None where a part is missing."""
    found: Any = results
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def rate_cell(rate: dict[str, Any] | None) -> Cell:
    """A cell from a ``results.Rate``."""
    if rate is None:
        return Cell()
    interval = f"{100 * rate['lo']:.0f}-{100 * rate['hi']:.0f}"
    return Cell(f"{100 * rate['rate']:.0f}%", interval, rate["rate"], rate["lo"], rate["hi"], rate["n"])


def _rate(path: str) -> Callable[[Results], Cell]:
    return lambda results: rate_cell(find(results, path))


def _difference(path: str) -> Callable[[Results], Cell]:
    def cell(results: Results) -> Cell:
        difference = find(results, f"{path}.difference")
        if difference is None:
            return Cell()
        value, lo, hi = (difference[key] for key in ("value", "lo", "hi"))
        return Cell(points(value), f"{points(lo)} to {points(hi)}", value, lo, hi, find(results, f"{path}.n"))

    return cell


def points(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{round(100 * share):+d}"


def _kid(results: Results) -> Cell:
    name = next((key for key in results["drift"] if key.startswith("kid-")), None)
    if name is None:
        return Cell()
    kid = results["drift"][name]
    value, lo, hi = (kid[key] for key in ("value", "lo", "hi"))
    return Cell(f"{1000 * value:.1f}", f"{1000 * lo:.0f} to {1000 * hi:.0f}", value, lo, hi, kid["n"])


def _number(path: str, form: str) -> Callable[[Results], Cell]:
    def cell(results: Results) -> Cell:
        value = find(results, path)
        return Cell() if value is None else Cell(form.format(value), value=value)

    return cell


COLUMNS = (
    Column(
        "named",
        "named: target",
        "down",
        "Prompts that name the concept: share of images in which the judge still sees it. The aim of an erasure.",
        _rate("erased.named.target_present"),
    ),
    Column(
        "named_other",
        "named: other",
        "",
        "The same prompts: share that shows another recognisable thing instead. Harmless, and what most methods aim at.",
        _rate("erased.named.other_present"),
    ),
    Column(
        "named_unrecognised",
        "named: unrec.",
        "down",
        "The same prompts: share in which the judge recognises nothing. Noise counts here, never as a clean erasure.",
        _rate("erased.named.unrecognised"),
    ),
    Column(
        "implied",
        "implied: target",
        "down",
        "Prompts that mean the concept by a synonym that no method was shown: share of images in which it still appears.",
        _rate("erased.implied.target_present"),
    ),
    Column(
        "implied_other",
        "implied: other",
        "",
        "The synonym prompts: share that shows another recognisable thing instead.",
        _rate("erased.implied.other_present"),
    ),
    Column(
        "implied_unrecognised",
        "implied: unrec.",
        "down",
        "The synonym prompts: share in which the judge recognises nothing.",
        _rate("erased.implied.unrecognised"),
    ),
    Column(
        "kept",
        "kept",
        "up",
        "Prompts without the concept, near and far ones: share of images that show all that was asked for.",
        _rate("kept.all"),
    ),
    Column(
        "kept_difference",
        "kept - base",
        "up",
        "The kept share less the base model's, in points, on the same prompts and seeds (Tango's interval for paired rates).",
        _difference("kept.all"),
    ),
    Column(
        "neighbours",
        "near - base",
        "up",
        "The same difference on near things alone: the concept's own category, or the same objects in other styles.",
        _difference("kept.neighbour"),
    ),
    Column("others", "far - base", "up", "The same difference on far things alone.", _difference("kept.other")),
    Column(
        "partner",
        "partner - base",
        "up",
        "Prompts that ask for the concept together with something else: how much more or less often the other thing appears.",
        _difference("partner"),
    ),
    Column(
        "unrecognised",
        "unrec. - base",
        "down",
        "All prompts: share of images in which the judge recognises nothing, less the base's. Over +10 points a model is destroyed.",
        _difference("unrecognised"),
    ),
    Column("style", "style", "up", "Share of prompts with an art style (not an erased one) whose image has that style.", _rate("style")),
    Column("background", "background", "up", "Share of prompts with a background whose image has that background.", _rate("background")),
    Column(
        "drift",
        "drift x1000",
        "down",
        "KID (EfficientNet-Lite0) of the kept prompts' images to the base's, times 1000: how far they moved, not how good they are.",
        _kid,
    ),
    Column("fit", "fit s", "down", "Seconds to fit the eraser.", _number("cost.fit_seconds", "{:.1f}")),
    Column("memory", "MB", "down", "Peak memory while the images were made, in megabytes.", _number("cost.peak_memory_mb", "{:.0f}")),
    Column(
        "time",
        "time x base",
        "down",
        "Seconds for an image, as a multiple of the base's on the same machine.",
        _number("cost.seconds_per_image_ratio", "{:.2f}"),
    ),
)

GROUPS = (
    ("Erased: by name", ("named", "named_other", "named_unrecognised")),
    ("Erased: by an unseen synonym", ("implied", "implied_other", "implied_unrecognised")),
    ("Kept", ("kept", "kept_difference", "neighbours", "others", "partner")),
    ("Images", ("unrecognised", "style", "background", "drift")),
    ("Cost", ("fit", "memory", "time")),
)
"""Columns under a common heading, in their order."""

BY_KEY = {column.key: column for column in COLUMNS}

TERMINAL = ("named", "implied", "kept", "kept_difference", "unrecognised", "drift", "fit", "memory", "time")
"""What fits a terminal, which shows all three calls of named and implied as one; files and the report have every column."""
