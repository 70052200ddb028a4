"""``erasure methods``, ``concepts`` and ``suites``: what there is."""

from importlib.resources import files
from typing import Any

from ..reading import read_yaml
from ..registry import methods as registry
from .options import Json, emit


def methods(*, json: Json = False) -> None:
    """List erasure methods, plug-ins included, and what was measured of each."""
    measured = read_yaml(files("erasure.canvas").joinpath("measured.yaml"), "measured.yaml")
    records: list[dict[str, Any]] = [
        {"method": name, "kind": entry.kind, "families": entry.families.split(), "summary": entry.summary}
        | {"measured": {model: table[name] for model, table in measured.items() if name in table}}
        for name, entry in registry.entries().items()
    ]
    if not json:
        records = [record | {"measured": "; ".join(_said(model, row) for model, row in record["measured"].items())} for record in records]
    emit(records, json, ("method", "kind", "families", "measured", "summary"))


def _said(model: str, row: dict[str, Any]) -> str:
    """One line of what was measured: how often the target is still seen, and kept images less the base's in points."""
    named, kept = row["named"], row["kept"]
    return f"{model}: named {named['rate']:.0%} ({named['lo']:.0%}-{named['hi']:.0%}), kept {100 * kept['value']:+.1f}, n={named['n']}"


def concepts(*, json: Json = False) -> None:
    """List concepts: shipped files, and the words of the canvas."""
    from ..canvas.splits import splits
    from ..canvas.world import world
    from ..concept import available

    records = [
        {"concept": name, "kind": c.kind, "model": "any", "split": "", "targets": list(c.targets)} for name, c in available().items()
    ]
    split, of = splits(), world()
    for kind, names in (("object", of.objects), ("style", of.styles), ("category", tuple(of.categories))):
        for name in names:
            where = "dev" if name in split.dev else "test" if name in split.test else ""
            synonyms = [] if kind == "category" else [of.synonyms(name)[0]]
            records.append({"concept": name, "kind": kind, "model": "canvas", "split": where, "targets": [name, *synonyms]})
    emit(records, json, ("concept", "kind", "model", "split", "targets"))
