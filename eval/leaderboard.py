"""The leaderboard: a folder a row, with what it is, how it was made and what came out; the page is made from the folders alone.

``python -m erasure.eval.leaderboard`` rebuilds docs/leaderboard.md and leaderboard/index.html from the folders in leaderboard/;
``python -m erasure.eval.leaderboard add RESULTS --command "erasure bench .."`` makes the folder of a new row from its results.
"""

import argparse
import html
import inspect
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError
from erasure.registry import methods

from . import exports, tables
from .compare import Comparison, Entry, compare
from .results import NAME

FILES = ("method.md", "config.json", "run.sh", NAME)
INTRO = (
    "One folder a row in `leaderboard/`: what it is (`method.md`), its settings (`config.json`), the command that made it (`run.sh`), and "
    "what came out (`results.json`). `make leaderboard` makes this page from them; nothing in it is typed by hand. Rows are compared "
    "within a table alone: another suite, protocol or concept is another table."
)


def load(folder: Path) -> list[tuple[Path, Entry]]:
    """Every row with its folder, checked; raises ErasureError for a lacking file, or settings that are not those of the results."""
    rows = []
    for row in sorted(path for path in folder.glob("[!.]*") if path.is_dir()):
        if lacking := [name for name in FILES if not (row / name).is_file()]:
            raise ErasureError(f"{row} lacks {', '.join(lacking)}: a row of the leaderboard has {', '.join(FILES)}")
        entry = Entry.of(row)
        try:
            config = json.loads((row / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ErasureError(f"{row / 'config.json'} is not JSON ({error}): make the row again") from error
        if config != configuration(entry):
            raise ErasureError(f"{row / 'config.json'} is not the configuration that {NAME} was made with: make the row again")
        rows.append((row, entry))
    return rows


def configuration(entry: Entry) -> dict[str, Any]:
    """All that has to be known to make a row again, as its results have it."""
    results = entry.results
    artefact = results["artefact"] or {}
    return {
        "name": entry.name,
        "model": results["model"],
        "method": artefact.get("method"),
        "settings": artefact.get("settings", {}),
        "seed": artefact.get("seed"),
        "concept": results["concept"],
        "suite": results["suite"],
        "protocol": results["protocol"],
    }


def boards(rows: Sequence[tuple[Path, Entry]]) -> list[Comparison]:
    """A table for each concept under each suite, protocol and base model."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for _, entry in rows:
        r = entry.results
        model = (r["model"] or {"fingerprint": ""})["fingerprint"]
        key = (r["suite"]["name"], r["concept"]["name"], r["suite"]["hash"], r["suite"]["rows"], r["protocol"]["hash"], model)
        groups.setdefault(key, []).append(entry)
    return [compare(groups[key]) for key in sorted(groups)]


def build(folder: Path, out: Path) -> list[Path]:
    """Write leaderboard.md into ``out``, and index.html beside the rows."""
    rows = load(folder)
    made = boards(rows)
    markdown = [f"# Leaderboard\n\n{INTRO}\n"]
    page = ["<h1>Leaderboard</h1>", f"<p>{html.escape(INTRO.replace('`', ''))}</p>"]
    for table in made:
        markdown.append(f"\n## {_about(table)}\n\n{tables.to_markdown(table)}")
        page.append(f"<h2>{html.escape(_about(table))}</h2>\n{exports.to_html(table)}")
    if not made:
        markdown.append("\nNo rows yet.\n")
        page.append("<p>No rows yet.</p>")
    head = '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Leaderboard</title>'
    head += "\n<style>td, th { padding: .2em .6em }</style>"
    texts = {out / "leaderboard.md": "".join(markdown), folder / "index.html": "\n".join([head, *page, "</html>", ""])}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}-{os.getpid()}")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    return list(texts)


def add(results: Path, folder: Path, command: str) -> Path:
    """The folder of a new row from a folder of results, and the command that made it; the samples come along where they rank."""
    entry = Entry.of(results)
    r = entry.results
    row = folder / "-".join([r["suite"]["name"], r["concept"]["name"], entry.name]).replace(" ", "-")
    if row.is_dir() and configuration(Entry.of(row)) != configuration(entry):
        raise ErasureError(f"{row} is a row of other settings: remove it first, or give these results another name")
    draft = folder / f".{row.name}-{os.getpid()}"
    draft.mkdir(parents=True)
    try:
        (draft / "method.md").write_text(_method(entry), encoding="utf-8")
        (draft / "config.json").write_text(json.dumps(configuration(entry), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        (draft / "run.sh").write_text(f"#!/bin/sh\nset -e\n{command}\n", encoding="utf-8")
        (draft / "run.sh").chmod(0o755)
        shutil.copyfile(results / NAME, draft / NAME)
        if r["suite"]["ranked"] and entry.samples is not None:
            shutil.copyfile(results / "samples.jsonl", draft / "samples.jsonl")
        shutil.rmtree(row, ignore_errors=True)
        os.replace(draft, row)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return row


def _method(entry: Entry) -> str:
    name = (entry.results["artefact"] or {}).get("method")
    if name is None:
        return f"# {entry.name}\n\nThe base model, with nothing erased.\n"
    method = methods.get(name)
    return f"# {entry.name}\n\n{inspect.getdoc(method) or name}\n"


def _about(table: Comparison) -> str:
    model = table.lines[0].entry.results["model"]
    return f"{table.concept['name']} on {model['id'] if model else 'an unnamed base'}, suite {table.suite['name']}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m erasure.eval.leaderboard", description="Make the leaderboard from its folders.")
    parser.add_argument("--rows", type=Path, default=Path("leaderboard"), help="folder of the rows")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page")
    new = parser.add_subparsers(dest="verb").add_parser("add", help="make the folder of a row from its results")
    new.add_argument("results", type=Path, nargs="+", help="folders with results.json")
    new.add_argument("--command", required=True, help="what made them")
    given = parser.parse_args(arguments)
    try:
        if given.verb == "add":
            made = [add(results, given.rows, given.command) for results in given.results]
        else:
            made = build(given.rows, given.out)
    except ErasureError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(map(str, made)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
