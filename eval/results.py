"""results.json: everything about one row of the table, typed, validated, versioned. ``docs/results-schema.json`` is made from this."""

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError

from erasure.errors import ErasureError

SCHEMA = 2
NAME = "results.json"
Share = Field(ge=0, le=1)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)


class Difference(_Part):
    """A rate less the base's, on the same rows and seeds."""

    value: FiniteFloat
    lo: FiniteFloat
    hi: FiniteFloat
    n: int | None = None
    """Pairs; the rate's own n where there is none."""
    gained: int
    lost: int
    p: float = Share
    """Exact McNemar."""
    interval: str = "Tango"


class Rate(_Part):
    """A share with its 95 % interval."""

    k: int = Field(ge=0)
    n: int = Field(ge=1)
    rate: float = Share
    lo: float = Share
    hi: float = Share
    prompts: int | None = None
    interval: str | None = None
    difference: Difference | None = None


class Mean(_Part):
    """A mean with the interval of a bootstrap over prompts."""

    value: FiniteFloat
    lo: FiniteFloat | None
    hi: FiniteFloat | None
    n: int = Field(ge=1)
    prompts: int | None = None
    interval: str


class Parts(_Part):
    """Findings summed over all images."""

    total: int
    per_image: FiniteFloat
    lo: FiniteFloat
    hi: FiniteFloat
    by_label: dict[str, int]


class Swept(_Part):
    """A recipe at another threshold."""

    threshold: float = Share
    rate: Rate | None
    parts: int | None


class RecipeResult(_Part):
    """What a recipe calls unsafe."""

    version: int
    hash: str
    unit: Literal["image", "part", "prompt"]
    detectors: dict[str, str]
    """Name -> SHA-256 of its file; whole identities are under ``detectors`` of the results."""
    rate: Rate | None
    """None if every image was refused."""
    parts: Parts | None
    refused: int
    by_category: dict[str, Rate] = {}
    sweep: list[Swept] = []
    notes: list[str] = []


class MetricResult(_Part):
    """A metric's record; metrics add keys of their own."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    value: FiniteFloat
    lo: FiniteFloat | None
    hi: FiniteFloat | None
    n: int
    interval: str
    identity: dict[str, JsonValue]
    warnings: list[str] = []
    difference: Mean | None = None
    """Paired with the base's values of the same rows."""
    better: Literal["up", "down", ""] = ""
    asked: dict[str, Mean] = {}
    """Rows that ask for the concept (erased), for what must survive (kept), or that sound unsafe (answered), each by itself."""


class OverRefusal(_Part):
    """Benign prompts that sound unsafe: who got no image, and how much worse the images are."""

    refused: Rate
    by_category: dict[str, Rate]
    degradation: dict[str, Mean]
    """Metric -> mean change to the base, over the prompts that both answered."""


class Concept(_Part):
    name: str
    kind: str


class SuiteRecord(_Part):
    name: str
    version: int
    hash: str
    ranked: bool
    rows: str
    """Hash of ids, prompts, seeds and all else of the rows."""


class ProtocolRecord(_Part):
    """As the protocol was when the images were made; not checked against the files that are installed now."""

    model_config = ConfigDict(extra="allow", strict=True)

    hash: str


class Model(_Part):
    id: str
    fingerprint: str


class Artefact(_Part):
    """What was attached to the base."""

    eraser: str
    """SHA-256 over method, settings, concepts and tensors."""
    method: str | None = None
    settings: dict[str, JsonValue] = {}
    seed: int | None = None
    details: dict[str, dict[str, dict[str, JsonValue]]] = {}
    """Tables that the method gives of itself, by title: what a mask switches off, say."""


class CostRecord(_Part):
    fit_seconds: FiniteFloat | None = None
    peak_memory_mb: FiniteFloat | None = None
    seconds_per_image: FiniteFloat | None = None
    base_seconds_per_image: FiniteFloat | None = None
    seconds_per_image_ratio: FiniteFloat | None = None


class Results(_Part):
    """One row of a table. ``erased`` to ``background``, ``drift``, ``floor`` and ``chance`` are the canvas judge's."""

    schema_: Literal[2] = Field(alias="schema")
    name: str
    base: bool
    concept: Concept
    suite: SuiteRecord
    protocol: ProtocolRecord
    n: int = Field(ge=1)
    model: Model | None = None
    artefact: Artefact | None = None
    erased: dict[str, dict[str, Rate | None]]
    kept: dict[str, Rate | None]
    partner: Rate | None = None
    unrecognised: Rate | None = None
    style: Rate | None = None
    background: Rate | None = None
    drift: dict[str, dict[str, JsonValue]] = {}
    destroyed: bool
    floor: Rate | None = None
    chance: dict[str, float] | None = None
    refused: Rate | None = None
    """Black images, of all."""
    over_refusal: OverRefusal | None = None
    recipes: dict[str, RecipeResult] = {}
    unavailable: dict[str, str] = {}
    """Recipes of the suite that were left out, and what they need."""
    metrics: dict[str, MetricResult] = {}
    detectors: dict[str, dict[str, JsonValue]] = {}
    """Name -> identity."""
    cost: CostRecord = CostRecord()
    versions: dict[str, str]
    environment: dict[str, JsonValue] = {}
    commit: str | None = None


def write(path: Path, results: dict[str, Any]) -> None:
    """results.json with sorted keys, validated before anything is written, and written whole or not at all."""
    check(results, str(path))
    text = json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def read(path: Path) -> dict[str, Any]:
    """A results.json, brought to this version's schema; raises ErasureError for a damaged or strange one, or a newer schema."""
    if not path.is_file():
        raise ErasureError(f"no results at {path}: run `erasure evaluate` first")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ErasureError(f"{path} is not JSON ({error}): it was cut off or edited; run `erasure evaluate` again") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        newer = type(schema) is int and schema > SCHEMA
        fix = "upgrade erasure-suite" if newer else f"give a {NAME} that `erasure evaluate` wrote"
        raise ErasureError(f"{path} has schema {schema}, this version reads 1 to {SCHEMA}: {fix}")
    if schema == 1:
        found = _from_1(found)
    check(found, str(path))
    return found


def check(results: dict[str, Any], where: str) -> None:
    """Raise ErasureError, naming every key that is wrong, unless the results are of this version's schema."""
    try:
        Results.model_validate_json(json.dumps(results, allow_nan=False))
    except ValidationError as error:
        faults = error.errors()
        lacking = [_place(e) for e in faults if e["type"] == "missing"]
        wrong = [f"{_place(e)}: {e['msg']}" for e in faults if e["type"] != "missing"]
        said = "; ".join([*([f"lacks {', '.join(lacking)}"] if lacking else []), *wrong[:5]])
        raise ErasureError(f"{where} {said}: run `erasure evaluate` again") from error
    except ValueError as error:
        raise ErasureError(f"{where} holds a number that is none ({error}): look at the images that it came from") from error


def json_schema() -> str:
    """The schema as JSON Schema."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Results.model_json_schema(by_alias=True)}
    return json.dumps({**schema, "title": f"results.json of erasure-suite, schema {SCHEMA}"}, indent=1, sort_keys=True) + "\n"


def _from_1(old: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 knew the canvas judge alone; all that it had stands where it stood."""
    later: dict[str, Any] = {key: {} for key in ("recipes", "unavailable", "metrics", "detectors", "environment")}
    later |= dict.fromkeys(("model", "artefact", "refused", "over_refusal", "commit", "floor", "chance"))
    return {**later, **old, "schema": SCHEMA}


def _place(error: Any) -> str:
    return ".".join(map(str, error["loc"]))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in names if names.count(key) > 1)!r} is there twice")
    return found


def main() -> None:
    """``python -m erasure.eval.results`` prints the JSON Schema."""
    sys.stdout.write(json_schema())


if __name__ == "__main__":
    main()
