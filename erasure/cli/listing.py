"""``erasure methods``, ``concepts`` and ``suites``: what there is."""

from ..registry import methods as registry
from .options import emit


def methods(*, json: bool = False) -> None:
    """List erasure methods, plug-ins included.

    Parameters
    ----------
    json: Print JSON.
    """
    emit([{"method": name, "summary": line} for name, line in registry.summaries().items()], json, ("method", "summary"))


def concepts(*, json: bool = False) -> None:
    """List concepts: shipped files, and the words of the canvas.

    Parameters
    ----------
    json: Print JSON.
    """
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


def suites(*, json: bool = False) -> None:
    """List evaluation suites.

    Parameters
    ----------
    json: Print JSON.
    """
    from erasure.eval.suite import list_suites

    records = [
        {"suite": s.name, "version": s.version, "images": s.size, "ranked": s.ranked, "hash": s.hash, "summary": s.summary}
        for s in list_suites()
    ]
    emit(records, json, ("suite", "version", "images", "ranked", "hash", "summary"))
