"""``erasure methods``, ``concepts`` and ``suites``: what there is."""

from ..registry import methods as registry
from .options import Json, emit


def methods(*, json: Json = False) -> None:
    """List erasure methods, plug-ins included."""
    records = [
        {"method": name, "kind": entry.kind, "families": entry.families.split(), "summary": entry.summary}
        for name, entry in registry.entries().items()
    ]
    emit(records, json, ("method", "kind", "families", "summary"))


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
