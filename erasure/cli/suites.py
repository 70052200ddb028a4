"""``erasure suites``: list them, show what one asks and where its prompts come from, fetch its files."""

import json as jsonlib
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cyclopts import App

from .examples import epilogue
from .options import Folder, Json, emit

if TYPE_CHECKING:
    from erasure.eval.prompt_rows import Loaded, Prompts
    from erasure.eval.suite import Suite

    from ..concept import Concept

app = App(name="suites", help_format="plaintext", help_epilogue=epilogue("suites"))


@app.default
def suites(*, json: Json = False) -> None:
    """List evaluation suites."""
    from erasure.eval.suite import list_suites

    records = [
        {"suite": s.name, "version": s.version, "images": s.size, "ranked": s.ranked, "hash": s.hash, "summary": s.summary}
        for s in list_suites()
    ]
    shown = [{**r, "images": "?" if r["images"] is None else r["images"]} for r in records]
    emit(records if json else shown, json, ("suite", "images", "ranked", "summary"))


@app.command(help_epilogue=epilogue("suites show"))
def show(name: str, *, prompts: Path | None = None, json: Json = False) -> None:
    """Show a suite: rows, source, licence, pins, filters, protocol, recipes.

    Parameters
    ----------
    name: Suite by name or .yaml file.
    prompts: File or folder with its prompts, to count what each filter keeps.
    """
    from erasure.eval.suite import load_suite

    suite = load_suite(name) if prompts is None else load_suite(name).with_prompts(prompts)
    record = describe(suite, None if prompts is None else suite.load(suite.default_concept()))
    if json:
        print(jsonlib.dumps(record, indent=2, ensure_ascii=False))
        return
    width = max(map(len, record))
    for key, value in record.items():
        lines = value if isinstance(value, list) else [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else [str(value)]
        for i, line in enumerate(lines):
            print(f"{'' if i else key:{width}}  {line}")


@app.command(help_epilogue=epilogue("suites fetch"))
def fetch(name: str, *, out: Folder, json: Json = False) -> None:
    """Fetch a suite's files, check them, and say what its filters keep.

    Parameters
    ----------
    name: Suite by name or .yaml file.
    out: Folder for the files; give it to `erasure generate` as --prompts.
    """
    from erasure.eval.sources import fetch as fetch_files
    from erasure.eval.suite import load_suite

    from ..errors import ErasureError

    suite = load_suite(name)
    if suite.prompts is None or suite.prompts.source is None:
        raise ErasureError(f"suite {suite.name} has no files: its rows follow from the concept alone")
    loaded = suite.load(suite.default_concept())
    found = fetch_files(suite.prompts.source, suite.name)
    out.mkdir(parents=True, exist_ok=True)
    for file in found:
        target = out / PurePosixPath(file.name).name
        draft = target.with_name(f".{target.name}-{os.getpid()}")
        draft.write_bytes(file.data)
        os.replace(draft, target)
    steps = [{"rule": s.rule, "before": s.before, "after": s.after} for s in loaded.steps]
    record = {"suite": suite.name, "folder": str(out), "sha256": loaded.sha256, "filters": steps, "rows": len(loaded.rows)}
    if json:
        print(jsonlib.dumps(record, indent=2, ensure_ascii=False))
        return
    for file in found:
        print(f"{out / PurePosixPath(file.name).name}  sha256 {file.sha256} ({'as pinned' if file.file.sha256 else 'unpinned'})")
    print("; ".join([*map(str, loaded.steps), f"{len(loaded.rows)} rows in all"]))


def describe(suite: "Suite", loaded: "Loaded | None" = None) -> dict[str, Any]:
    """A suite as plain data for people; with its rows loaded, also what each filter kept."""
    protocol = suite.protocol.model_dump(exclude_none=True, exclude={"judge_sha256", "features_sha256"})
    record: dict[str, Any] = {
        "suite": f"{suite.name}, version {suite.version}, hash {suite.hash}",
        "summary": suite.summary,
        "images": _images(suite, loaded),
    }
    if suite.prompts is not None:
        record |= _prompts(suite.prompts, suite, loaded)
    record |= {"protocol": {key: value for key, value in protocol.items() if value not in ("", {})}}
    if suite.flow:
        record["flow models"] = suite.flow
    return record | {"recipes": ", ".join(suite.recipes) or "-", "metrics": ", ".join(suite.metrics) or "-"}


def _images(suite: "Suite", loaded: "Loaded | None") -> str:
    if loaded is not None:
        return f"{len(loaded.rows)}"
    if suite.size is None:
        return "as many as the concept's words give" if suite.asks_concept else "not documented"
    kinds = ", ".join(f"{kind} {n}" for kind, n in suite.counts.items() if n)
    return f"{suite.size} ({kinds or 'before the filters'})"


def _prompts(prompts: "Prompts", suite: "Suite", loaded: "Loaded | None") -> dict[str, Any]:
    own = [field for field in ("seed", "guidance", "height", "width") if getattr(prompts.columns, field)]
    files = ["the suite's own sentences, filled with words" if prompts.asks_concept else str(prompts.source)]
    for file in prompts.source.files if prompts.source else ():
        rows = f", {file.rows} rows" if file.rows else ""
        files.append(f"{file.path or 'its only file of prompts'}{rows}, {f'sha256 {file.sha256}' if file.sha256 else 'UNPINNED'}")
    return {
        "source": files,
        "content": prompts.content,
        "licence": prompts.licence,
        "access": prompts.access,
        "note": " ".join(prompts.note.split()) or "-",
        "columns": {k: ", ".join(v) if isinstance(v, tuple) else v for k, v in prompts.columns.model_dump().items() if v},
        "rows' own": ", ".join(own) or "nothing; the protocol's for all",
        "kinds": _kinds(prompts),
        "filters": _filters(prompts, suite, loaded),
    }


def _kinds(prompts: "Prompts") -> str:
    from erasure.eval.rows import ASKED, Kind

    of: set[Kind] = {file.kind for file in prompts.source.files if file.kind} if prompts.source else set()
    if prompts.asks is not None:
        of |= {kind for kinds in prompts.asks.values() for kind in kinds}
    elif prompts.grid is not None:
        of |= {"named", "neighbour"}
    elif not of:
        of |= {prompts.kind} if isinstance(prompts.kind, str) else set(prompts.kind.values.values())
    return ", ".join(f"{kind} ({ASKED[kind]})" for kind in sorted(of))


def _filters(prompts: "Prompts", suite: "Suite", loaded: "Loaded | None") -> list[str]:
    from erasure.eval.filters import describe as describe_rule
    from erasure.eval.prompt_rows import named

    counted = [f" [{s.after} of {s.before} kept]" for s in loaded.steps] if loaded else [""] * len(prompts.filters)
    lines = [f"{named(one)[0]}: {describe_rule(*named(one))}{n}" for one, n in zip(prompts.filters, counted, strict=True)]
    if lines and loaded is None and suite.counts and prompts.source is not None and prompts.source.rows:
        lines.append(f"together: {sum(suite.counts.values()) // prompts.images_per_prompt} of {prompts.source.rows} kept")
    return lines or ["none"]


def walk_through(suite: "Suite", concept: "Concept", json: bool, more: dict[str, Any] | None = None) -> None:
    """What a run on a prompt suite would make, without weights or downloads: from its own words, a local file, or our sample.

    more: what else to say; a table or list in it takes a line an entry.
    """
    local = suite.prompts is None or suite.prompts.source is None or suite.prompts.source.folder or suite.prompts.source.package
    read = suite if local else suite.sample()
    rows = read.rows(concept)
    images = len(rows) if local else suite.size
    of = suite.protocol
    pixels = of.height * of.width * (of.frames or 1)
    record = {
        "suite": suite.name,
        "hash": suite.hash,
        "concept": concept.name,
        "images": images,
        "megabytes": None if images is None else round(images * pixels * 3 / 1e6, 1),
        "scheduler": of.scheduler,
        "steps": of.steps,
        "prompts": str(suite.prompts.source) if suite.prompts and suite.prompts.source else "the concept's own words",
        "read": f"{len(rows)} rows of {'the suite' if local else 'our sample of its columns'}; nothing was fetched, no weights were loaded",
    }
    record |= more or {}
    if json:
        print(jsonlib.dumps(record, ensure_ascii=False))
        return
    for key, value in record.items():
        lines = [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        entries = [", ".join(f"{k} {v or 'not published'}" for k, v in one.items()) if isinstance(one, dict) else one for one in lines]
        print(f"{key}: {entries[0] if entries else 'none'}", *(f"  {entry}" for entry in entries[1:]), sep="\n")
