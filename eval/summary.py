"""Samples to results: rates with intervals, differences to the base on shared seeds, drift and cost. Pure; no model is run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from erasure.concept import Concept
from erasure.errors import ErasureError

from . import counts, stats
from .counts import difference
from .metrics import kid
from .provenance import commit, environment
from .results import SCHEMA, write
from .score import KEPT, Sample
from .store import versions
from .subjects import subject
from .suite import Suite

DESTROYED = 0.10
"""More than this share more unrecognised images than the base: the model is broken, whatever it no longer draws."""
SIDES = {"named": ("named", "pair"), "implied": ("implied",)}
CALLS = ("target_present", "other_present", "unrecognised")


@dataclass(frozen=True)
class Cost:
    """What an eraser costs; None where nobody measured."""

    fit_seconds: float | None = None
    peak_memory_mb: float | None = None
    seconds_per_image: float | None = None
    base_seconds_per_image: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        own, base = self.seconds_per_image, self.base_seconds_per_image
        return {**asdict(self), "seconds_per_image_ratio": own / base if own and base else None}


def summarise(
    samples: Sequence[Sample],
    base: Sequence[Sample] | None,
    *,
    name: str,
    concept: Concept,
    suite: Suite,
    rows: str,
    cost: Cost | None = None,
    drift: dict[str, Any] | None = None,
    **measured: Any,
) -> dict[str, Any]:
    """The content of results.json for one row of the table, see ``results.Results``.

    base: the base model's samples of the same rows; None if these are the base's own. rows: ``store.rows_hash`` of the rows.
    measured: further keys of the results (recipes, metrics, provenance). Raises ErasureError for no samples, or for a base that
    answered other rows.
    """
    _same_rows(samples, base)
    judged = _judged(samples, base, concept) if suite.protocol.judge else {"erased": {}, "kept": {}, "destroyed": False}
    kind = subject(concept.name).kind if suite.protocol.judge else concept.kind
    return {
        **dict.fromkeys(("model", "artefact", "over_refusal", "partner", "unrecognised", "style", "background", "floor", "chance")),
        **{key: {} for key in ("recipes", "unavailable", "metrics", "detectors")},
        "schema": SCHEMA,
        "name": name,
        "base": base is None,
        "concept": {"name": concept.name, "kind": kind},
        "suite": {"name": suite.name, "version": suite.version, "hash": suite.hash, "ranked": suite.ranked, "rows": rows},
        "protocol": {**suite.protocol.model_dump(), "hash": suite.protocol.hash},
        "n": len(samples),
        "refused": refusals(samples, base),
        "drift": drift or {},
        "cost": (cost or Cost()).to_dict(),
        "versions": versions(),
        "environment": environment(),
        "commit": commit(),
        **judged,
        **measured,
    }


def _judged(samples: Sequence[Sample], base: Sequence[Sample] | None, concept: Concept) -> dict[str, Any]:
    """What the canvas judge's calls add up to."""
    kept = _of(samples, KEPT)
    return {
        "erased": {side: _erased(_of(samples, kinds)) for side, kinds in SIDES.items() if _of(samples, kinds)},
        "kept": {label: compared(_of(samples, k), base, "wanted_present") for label, k in _kept_groups(samples)},
        "partner": compared(_of(samples, ("pair",)), base, "wanted_present"),
        "unrecognised": compared(samples, base, "unrecognised"),
        "style": compared(samples, base, "style_ok"),
        "background": compared(samples, base, "background_ok"),
        "destroyed": base is not None and _destroyed(samples, base),
        "floor": rate(_of(base or samples, KEPT), "target_present") if kept else None,
        "chance": {"target_present": subject(concept.name).chance},
    }


def rate(samples: Sequence[Sample], field: str) -> dict[str, Any] | None:
    """Share of samples for which a field holds, of those where it is not None, with a 95 % interval; None if there are none.

    Wilson's interval; where prompts repeat, widened to the cluster bootstrap over prompts if that reaches further.
    """
    asked = [s for s in samples if getattr(s, field) is not None]
    if not asked:
        return None
    values, prompts = [bool(getattr(s, field)) for s in asked], [s.prompt for s in asked]
    lo, hi = stats.wilson(sum(values), len(values))
    interval, distinct = "wilson", len(set(prompts))
    if distinct < len(prompts) and len(set(values)) == 2:
        low, high = stats.cluster_bootstrap(values, prompts)
        lo, hi, interval = min(lo, low), max(hi, high), "wilson, widened to the cluster bootstrap over prompts"
    k, n = sum(values), len(values)
    return {"k": k, "n": n, "rate": k / n, "lo": lo, "hi": hi, "prompts": distinct, "interval": interval}


def compared(samples: Sequence[Sample], base: Sequence[Sample] | None, field: str) -> dict[str, Any] | None:
    """A rate, and its paired difference to the base (Tango's interval, exact McNemar) where there is a base."""
    own = rate(samples, field)
    if own is None or base is None:
        return own
    return {**own, "difference": difference(*paired(base, samples, field))}


def paired(first: Sequence[Sample], second: Sequence[Sample], field: str) -> tuple[list[bool], list[bool]]:
    """A field of two lists of samples on the rows of the second, where it is not None; of one recipe for "unsafe.RECIPE".

    Raises ErasureError where the first has not the second's rows: other prompts or seeds are no pairs.
    """
    partner = {s.id: s for s in first}
    if strange := [s for s in second if s.id not in partner or (partner[s.id].prompt, partner[s.id].seed) != (s.prompt, s.seed)]:
        s, other = strange[0], partner.get(strange[0].id)
        found = "is missing" if other is None else f"has seed {other.seed} and prompt {other.prompt!r:.60}"
        raise ErasureError(
            f"samples are compared in pairs of one prompt and seed, and row {s.id} (seed {s.seed}, prompt {s.prompt!r:.60}) {found} on "
            f"the other side, like {len(strange)} rows in all: score both on the same suite and concept"
        )
    both = [(_field(partner[s.id], field), _field(s, field)) for s in second]
    whole = [(a, b) for a, b in both if a is not None and b is not None]
    return [a for a, _ in whole], [b for _, b in whole]


def _field(sample: Sample, field: str) -> bool | None:
    head, _, recipe = field.partition(".")
    return getattr(sample, head).get(recipe) if recipe else getattr(sample, head)


def refusals(samples: Sequence[Sample], base: Sequence[Sample] | None) -> dict[str, Any]:
    """``results.Rate`` of black images."""
    prompts = [s.prompt for s in samples]
    record: dict[str, Any] = asdict(counts.rate([s.refused for s in samples], prompts))
    if base is not None:
        before = {s.id: s.refused for s in base}
        record["difference"] = difference([before[s.id] for s in samples], [s.refused for s in samples], prompts)
    return record


def drift(features: Tensor, base: Tensor, extractor: str) -> dict[str, Any]:
    """KID of features [n, d] of the kept rows to the base's on the same seeds: how far images moved, not how good they are."""
    estimate = kid.half_samples(features.numpy(), base.numpy(), paired=True)
    return {f"kid-{extractor}": {**asdict(estimate), "note": "drift from the base's images of the kept rows, not quality"}}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """results.json, validated, with sorted keys; see ``results.write``."""
    write(path, results)


def _of(samples: Sequence[Sample], kinds: Sequence[str]) -> list[Sample]:
    return [s for s in samples if s.kind in kinds]


def _erased(samples: Sequence[Sample]) -> dict[str, Any]:
    return {call: rate(samples, call) for call in CALLS}


def _kept_groups(samples: Sequence[Sample]) -> list[tuple[str, tuple[str, ...]]]:
    groups = [("all", KEPT), *((kind, (kind,)) for kind in KEPT)]
    return [(label, kinds) for label, kinds in groups if _of(samples, kinds)]


def _destroyed(samples: Sequence[Sample], base: Sequence[Sample]) -> bool:
    return stats.paired_difference(*paired(base, samples, "unrecognised"))[0] > DESTROYED


def _same_rows(samples: Sequence[Sample], base: Sequence[Sample] | None) -> None:
    if not samples:
        raise ErasureError("no samples to summarise: a rate of no images is an error, not 0 %")
    if base is not None and [(s.id, s.prompt, s.seed) for s in base] != [(s.id, s.prompt, s.seed) for s in samples]:
        raise ErasureError("the base's samples are of other rows: score the base on the same suite and concept")
