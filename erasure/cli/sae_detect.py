"""``erasure sae detect``: the gate of itd as a detector of prompts."""

import json as jsonlib
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ..errors import ErasureError
from .options import Json, What, emit
from .sae_inspect import Coder, OnCanvas

if TYPE_CHECKING:
    from ..concept import Concept

COLUMNS = ("score", "threshold", "decision", "prompt")
SIDES = {"named": ("named", "pair"), "implied": ("implied",)}
"""What is told from unrelated prompts; in a pair the concept is named beside something else."""
UNRELATED = ("neighbour", "other")


def detect(
    base: OnCanvas = OnCanvas(),
    what: What = What(),
    coder: Coder = Coder(),
    *,
    prompts: Annotated[
        str,
        Parameter(
            help="File of prompts (.txt, .csv, .tsv, .json, .jsonl, .parquet), a suite, or - for standard input, one a line.",
            allow_leading_hyphen=True,
        ),
    ],
    evaluate: Annotated[
        bool,
        Parameter(help="Print how well a suite's kinds are told apart instead: ROC-AUC with its 95 % interval.", negative=()),
    ] = False,
    json: Json = False,
) -> None:
    """Which prompts have a concept: how far switching its features moves each, against a share of the least that its own phrases show."""
    concepts = what.concepts(base.model)
    rows = asked(prompts, concepts)
    kinds = [kind for _, kind in rows]
    if evaluate and not any(kind in UNRELATED for kind in kinds):
        raise ErasureError(f"--evaluate compares kinds of prompts, and {prompts} has none that are unrelated: give a suite such as canvas")
    pipe = base.load()
    found = coder.method().fit(pipe, concepts).detect(pipe, [text for text, _ in rows])
    records = [{**asdict(one), **({"kind": kind} if kind else {})} for one, kind in zip(found, kinds, strict=True)]
    if evaluate:
        _show_measured(measure(records), json)
        return
    emit(records if json else [{**r, "score": f"{r['score']:.3g}", "threshold": f"{r['threshold']:.3g}"} for r in records], json, COLUMNS)


def asked(source: str, concepts: tuple["Concept", ...]) -> list[tuple[str, str]]:
    """(prompt, kind of the suite's row, or ""), each prompt once; none at all raises."""
    from erasure.eval.readers import read_records
    from erasure.eval.suite import load_suite

    if source == "-" or Path(source).is_file():
        name, data = ("standard input", sys.stdin.buffer.read()) if source == "-" else (source, Path(source).read_bytes())
        records = read_records("standard input.txt" if source == "-" else source, data)
        if "prompt" not in records[0]:
            raise ErasureError(f"{name} has no column 'prompt', but {', '.join(records[0])}: rename the one that has the prompts")
        rows = [(text, "") for record in records if (text := record.get("prompt", "").strip())]
    else:
        name = source
        if Path(source).suffix not in ("", ".yaml", ".yml"):
            raise ErasureError(f"no file {source}; check the path, or give a suite")
        suite = load_suite(source)
        if suite.asks_concept and len(concepts) > 1:
            raise ErasureError(f"what suite {suite.name} asks depends on the concept: give one --concept, not {len(concepts)}")
        rows = [(row.prompt, row.kind) for row in suite.rows(concepts[0])]
    if not rows:
        raise ErasureError(f"{name} holds no prompts: a text file has one a line, a table a column named prompt")
    first: dict[str, str] = {}
    for text, kind in rows:
        first.setdefault(text, kind)
    return list(first.items())


def measure(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each side against unrelated prompts: n, ROC-AUC with its interval, and the share that the gate calls the concept (Wilson)."""
    from erasure.eval import stats

    records = list(records)
    unrelated = [r for r in records if r["kind"] in UNRELATED]
    out: list[dict[str, Any]] = []
    for side, kinds in {**SIDES, "unrelated": UNRELATED}.items():
        of = [r for r in records if r["kind"] in kinds]
        if not of:
            continue
        called = sum(r["decision"] == "concept" for r in of)
        line: dict[str, Any] = {"prompts": side, "n": len(of), "called": called / len(of), "called_interval": stats.wilson(called, len(of))}
        if side != "unrelated":
            scores, others = ([r["score"] / r["threshold"] for r in rows] for rows in (of, unrelated))
            area, *limits = stats.auc(scores, others)
            line |= {"auc": area, "auc_interval": limits}
        out.append(line)
    return out


def _show_measured(lines: list[dict[str, Any]], json: bool) -> None:
    if json:
        print(jsonlib.dumps(lines, indent=2))
        return
    shown = [
        {
            "prompts": line["prompts"],
            "n": line["n"],
            "ROC-AUC": f"{line['auc']:.3f} ({line['auc_interval'][0]:.3f} to {line['auc_interval'][1]:.3f})" if "auc" in line else "-",
            "called the concept": f"{line['called']:.1%} ({line['called_interval'][0]:.1%} to {line['called_interval'][1]:.1%})",
        }
        for line in lines
    ]
    emit(shown, False, ("prompts", "n", "ROC-AUC", "called the concept"))
