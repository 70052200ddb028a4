"""Do the harness's metrics tell four controls apart as they should? And what does FID say at small n?

    python scripts/train_canvas.py --control        # once: the canvas trained without the test concepts, 40 minutes and more
    python benchmarks/meta_evaluation.py            # about ten minutes on two cores; goes on where it stopped
    python benchmarks/meta_evaluation.py --limit 20 # a look; writes no file

Rows: the canvas suite's kinds for all eight test concepts, pooled. The controls are the base, a canvas that never saw the test concepts,
a destroyer (noise, flat colours) and a refuser (one image of the concept's anchor for every prompt); beside them the base at other seeds,
which is as good as the base, and moves every pixel. ``meta_evaluation_orderings.EXPECTED`` says in which order each metric has to put
them. An order holds if the 95 % interval of the difference, paired on prompts, lies wholly on the right side; a metric is fit for a
reading if all its orders hold, so nothing is adjusted for their number.
"""

import argparse
import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from meta_evaluation_controls import Plan, Seen, flat, learned, look, make
from meta_evaluation_measures import Distances, Means, Rates
from meta_evaluation_orderings import BASE, CONTROLS, EXPECTED, RESEEDED, RETRAINED, Measure
from overhead import environment

from erasure.eval.choice import Choice
from erasure.eval.metrics import cmmd, frechet, kid, metrics
from erasure.eval.score import KEPT, Sample
from erasure.eval.stats import wilson
from erasure.eval.subjects import subject
from erasure.eval.suite import Suite, load_suite
from erasure.eval.summary import DESTROYED, SIDES, compared
from erasure.models import load_base

JSON = Path(__file__).parent.parent / "docs" / "benchmarks" / "meta.json"
COUNTS = {"named": 28, "pair": 12, "implied": 12, "neighbour": 28, "other": 28}
"""Rows of a concept: fewer than the suite's, in its kinds."""
SIZES, DRAWS = (50, 100, 200, 400), 20


def measures(plan: Plan, seen: Mapping[str, Seen]) -> dict[str, Measure]:
    """Everything that EXPECTED reads, by its key."""
    chance = sum(subject(concept).chance * len(rows) for concept, rows in plan.asked.items()) / len(flat(plan.asked))
    kept = [row.prompt for row in flat(plan.kept)]
    found: dict[str, Measure] = {
        "named": rates(seen, "target_present", SIDES["named"], chance),
        "implied": rates(seen, "target_present", SIDES["implied"], chance),
        "named_other": rates(seen, "other_present", SIDES["named"]),
        "named_unrecognised": rates(seen, "unrecognised", SIDES["named"]),
        "unrecognised": rates(seen, "unrecognised", None),
        "destroyed": Rates({name: marked(own, seen[BASE]) for name, own in seen.items()}, list(plan.asked)),
        "kept": rates(seen, "wanted_present", KEPT),
        "partner": partner(plan, seen),
        "style": rates(seen, "style_ok", KEPT),
        "background": rates(seen, "background_ok", KEPT),
        "alignment": Means({name: own.means["canvas_alignment"] for name, own in seen.items()}, kept),
        "st_lpips": Means({name: own.means["st_lpips"] for name, own in seen.items()}, kept),
    }
    judged = {name: own.judged[: len(kept)] for name, own in seen.items()}
    for key, distance in {"kid": _kid, "fid": _fid, "cmmd": _cmmd}.items():
        found[key] = Distances(judged, judged[BASE], distance)
    drift = {name: own.drift for name, own in seen.items()}
    return {**found, "kid_efficientnet": Distances(drift, drift[BASE], _kid)}


def rates(seen: Mapping[str, Seen], field: str, kinds: tuple[str, ...] | None, chance: float | None = None) -> Rates:
    """A call of the judge over rows of some kinds, or all, that it applies to."""

    def of(samples: dict[str, list[Sample]]) -> list[Sample]:
        some = [s for own in samples.values() for s in own if kinds is None or s.kind in kinds]
        return [s for s in some if getattr(s, field) is not None]

    calls = {name: [bool(getattr(s, field)) for s in of(own.samples)] for name, own in seen.items()}
    return Rates(calls, [s.prompt for s in of(seen[BASE].samples)], chance)


def partner(plan: Plan, seen: Mapping[str, Seen]) -> Rates:
    """Whether the other thing of a pair is there, where the retrained control saw it."""
    fair = {row.id for concept, rows in plan.asked.items() for row in rows if row.kind == "pair" and learned(row, concept)}
    calls = {name: [bool(s.wanted_present) for of in own.samples.values() for s in of if s.id in fair] for name, own in seen.items()}
    return Rates(calls, [row.prompt for row in flat(plan.asked) if row.id in fair])


def marked(own: Seen, base: Seen) -> list[bool]:
    """By concept, whether the harness marks the control as destroyed."""
    found = [compared(samples, base.samples[concept], "unrecognised") for concept, samples in own.samples.items()]
    return [record is not None and record["difference"]["value"] > DESTROYED for record in found]


def _kid(x: np.ndarray, y: np.ndarray) -> float:
    return kid.polynomial_mmd(x, y, paired=True)


def _fid(x: np.ndarray, y: np.ndarray) -> float:
    return frechet.distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))


def _cmmd(x: np.ndarray, y: np.ndarray) -> float:
    unit = (torch.nn.functional.normalize(torch.from_numpy(side), dim=1) for side in (x, y))
    return cmmd.mmd(*unit)


def agree(found: Mapping[str, Measure], seen: Mapping[str, Seen]) -> None:
    """The distances here are those that the harness's metrics print."""
    for name, own in seen.items():
        for key, printed in own.sets.items():
            here = found[key].value(name).value
            assert abs(here - printed) <= 1e-4 * max(1, abs(printed)), (key, name, here, printed)


def never_learned(plan: Plan, seen: Mapping[str, Seen]) -> list[dict[str, Any]]:
    """By concept: what base and retrained control draw for prompts that name it, and of what must survive."""
    rows = []
    for concept in plan.asked:
        row: dict[str, Any] = {"concept": concept, "kind": subject(concept).kind, "chance": subject(concept).chance}
        for name in (BASE, RETRAINED):
            samples = seen[name].samples[concept]
            named, kept = ([s for s in samples if s.kind in kinds] for kinds in (SIDES["named"], KEPT))
            calls = {call: _share([getattr(s, call) for s in named]) for call in ("target_present", "other_present", "unrecognised")}
            row[name] = {**calls, "kept": _share([s.wanted_present for s in kept])}
            instead = Counter(what for s in named for what in ((s.style,) if row["kind"] == "style" else s.objects) if what)
            row[name]["seen"] = dict(instead.most_common(4))
        rows.append(row)
    return rows


def _share(calls: list[Any]) -> dict[str, Any]:
    k, n = sum(calls), len(calls)
    return {"rate": k / n, "lo": wilson(k, n)[0], "hi": wilson(k, n)[1], "n": n}


def small_n(seen: Mapping[str, Seen]) -> list[dict[str, Any]]:
    """FID and KID to the base's images of the same prompts over draws of n rows: of the base at other seeds, of the retrained control."""
    rng, base, table = np.random.default_rng(0), seen[BASE].judged, []
    for n in (size for size in SIZES if size <= len(base)):
        drawn = [rng.choice(len(base), n, replace=False) for _ in range(DRAWS)]
        row: dict[str, Any] = {"n": n, "draws": DRAWS}
        for name in (RESEEDED, RETRAINED):
            for key, distance in {"fid": _fid, "kid": _kid}.items():
                values = [distance(seen[name].judged[d], base[d]) for d in drawn]
                row[f"{key} {name}"] = {"mean": float(np.mean(values)), "lowest": min(values), "highest": max(values)}
        table.append(row)
    return table


def not_run() -> dict[str, list[str]]:
    """Metric -> files that it would need with its own network, of all metrics that the harness has."""
    needs = {name: Choice(metrics=(name,)).describe()["downloads"] for name in metrics.names()}
    return {name: [f"{file['file']} ({file['source']})" for file in files] for name, files in needs.items() if files}


def tables(result: dict[str, Any]) -> str:
    """All tables as Markdown."""

    def number(key: str, of: dict[str, float]) -> str:
        share = key in SHARES
        form = "{:.0f}" if share else "{:.3g}"
        times = 100 if share else 1000 if key.startswith("kid") else 1
        value, lo, hi = (form.format(round(times * of[part], 6) + 0.0) for part in ("value", "lo", "hi"))  # no -0
        return f"{value}{' %' if share else ''} ({lo} to {hi})"

    lines = ["| metric | " + " | ".join(CONTROLS) + " | n |", "|---|" + "---|" * len(CONTROLS) + "---:|"]
    for key, of in result["values"].items():
        title = next(r.title for r in EXPECTED if r.measure == key).removesuffix(", read as drift")
        title += " x1000" if key.startswith("kid") else ""
        lines.append(f"| {title} | " + " | ".join(number(key, of[name]) for name in CONTROLS) + f" | {of[BASE]['n']} |")
    lines += ["", "| reading | expected | verdict |", "|---|---|---|"]
    for reading in result["readings"]:
        marks = {"held": "", "unfit": " (no)", "not shown": " (not shown)"}
        claims = "; ".join(claim["claim"] + marks[claim["verdict"]] for claim in reading["claims"])
        lines.append(f"| {reading['reading']} | {claims} | {reading['verdict']} |")
    lines += ["", "| concept | base: target | retrained: target / another thing / nothing | it draws instead | kept: base | retrained |"]
    lines.append("|---|---|---|---|---|---|")
    for row in result["never_learned"]:
        base, other = row[BASE], row[RETRAINED]
        parts = " / ".join(f"{100 * other[call]['rate']:.0f}" for call in ("target_present", "other_present", "unrecognised"))
        interval = f"{100 * other['target_present']['lo']:.0f}-{100 * other['target_present']['hi']:.0f}"
        instead = ", ".join(f"{what} {n}" for what, n in other["seen"].items())
        kept = " | ".join(f"{100 * of['kept']['rate']:.0f} % (n={of['kept']['n']})" for of in (base, other))
        shown = f"{100 * base['target_present']['rate']:.0f} %"
        lines.append(f"| {row['concept']} | {shown} | {parts} % ({interval}), n={other['target_present']['n']} | {instead} | {kept} |")
    heads = [f"{key} {name}" for key in ("fid", "kid") for name in (RESEEDED, RETRAINED)]
    titles = [f"{head.split()[0].upper()}{' x1000' if head[0] == 'k' else ''}, {head.split(' ', 1)[1]}" for head in heads]
    lines += ["", "| n | " + " | ".join(titles) + " |", "|---:|" + "---|" * len(heads)]
    for row in result["small_n"]:
        shown = [[f"{(1000 if h[0] == 'k' else 1) * row[h][k]:.3g}" for k in ("mean", "lowest", "highest")] for h in heads]
        lines.append(f"| {row['n']} | " + " | ".join(f"{mean} ({low} to {high})" for mean, low, high in shown) + " |")
    lines += ["", "Not run, for lack of weights here:"]
    lines += [f"* {name}: {', '.join(files)}" for name, files in result["not_run"].items()]
    return "\n".join(lines)


SHARES = {r.measure for r in EXPECTED} - {"alignment", "kid", "kid_efficientnet", "fid", "cmmd", "st_lpips"}


def evaluate(suite: Suite, control: str, folder: Path) -> dict[str, Any]:
    """Images, scores, verdicts."""
    plan = Plan.of(suite)
    base, other = load_base("canvas", device="cpu"), load_base(control, device="cpu")
    seen = look(plan, make(plan, base, other, folder))
    found = measures(plan, seen)
    agree(found, seen)
    return {
        "environment": environment(),
        "suite": {"counts": suite.counts, "protocol": suite.protocol.hash, "judge_sha256": suite.protocol.judge_sha256},
        "rows": {"asked": len(flat(plan.asked)), "kept": len(flat(plan.kept))},
        "values": {key: {name: vars(measure.value(name)) for name in CONTROLS} for key, measure in found.items()},
        "readings": [reading.judge(found[reading.measure]) for reading in EXPECTED],
        "never_learned": never_learned(plan, seen),
        "small_n": small_n(seen),
        "not_run": not_run(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--control", default="canvas-build/control-pipeline", help="the retrained control")
    parser.add_argument("--out", type=Path, default=Path("out/meta-evaluation"), help="where the images go")
    parser.add_argument("--limit", type=int, help="about so many rows a concept; writes no file")
    arguments = parser.parse_args()
    if not Path(arguments.control).is_dir():
        parser.error(f"no control at {arguments.control}: make it with python scripts/train_canvas.py --control")
    logging.getLogger("erasure").setLevel(logging.ERROR)  # FID warns of every small n, which is what is measured here
    suite = load_suite("canvas").model_copy(update={"counts": COUNTS, "ranked": False})
    folder = arguments.out
    if arguments.limit:
        suite, folder = suite.limited(arguments.limit), folder / f"limit-{arguments.limit}"
    result = evaluate(suite, arguments.control, folder)
    print(tables(result), flush=True)
    if not arguments.limit:
        JSON.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
