"""What a sound metric must say of the controls, written down before looking; and whether numbers with intervals bear it out."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, Protocol

BASE, RESEEDED, RETRAINED, DESTROYER, REFUSER = "base", "other seeds", "retrained", "destroyer", "refuser"
CONTROLS = (BASE, RESEEDED, RETRAINED, DESTROYER, REFUSER)
"""The base, also at other seeds; a canvas that never saw the test concepts; noise and flat colours; the anchor's image for every prompt."""
CHANCE = "chance"
"""In a claim: how often random drawings would show the target."""

Verdict = Literal["held", "unfit", "not shown"]
CLOSE = 0.10
"""Of shares that should be alike: the same ten points that mark a model as destroyed."""


@dataclass(frozen=True)
class Value:
    """A number with its 95 % interval."""

    value: float
    lo: float
    hi: float
    n: int


class Measure(Protocol):
    """A metric's numbers on the controls."""

    def value(self, of: str) -> Value:
        """Of one control."""

    def difference(self, left: str, right: str) -> Value:
        """left - right, on the same prompts; right may be ``CHANCE`` where the measure has one."""


@dataclass(frozen=True)
class Claim:
    """left - right lies between low and high; without right, left does."""

    left: str
    right: str | None = None
    low: float = -inf
    high: float = inf

    def verdict(self, found: Value) -> Verdict:
        """held if the whole interval lies inside, unfit if the whole interval lies outside, else not shown.

        >>> Claim("a", "b", low=0).verdict(Value(0.2, -0.1, 0.5, 10))
        'not shown'
        """
        if found.lo > self.low and found.hi < self.high:
            return "held"
        return "unfit" if found.hi <= self.low or found.lo >= self.high else "not shown"

    def __str__(self) -> str:
        if self.right is None:
            return f"{self.left} {f'> {self.low:g}' if self.high == inf else f'< {self.high:g}'}"
        if inf in (self.high, -self.low):
            return f"{self.left} {'>' if self.high == inf else '<'} {self.right}"
        return f"{self.left} within {self.high:g} of {self.right}"


@dataclass(frozen=True)
class Reading:
    """A metric, and what its numbers are taken to mean; one metric may be fit for one reading and unfit for another."""

    measure: str
    title: str
    claims: tuple[Claim, ...]

    def judge(self, measure: Measure) -> dict[str, Any]:
        """The verdict, with every claim's."""
        claims = []
        for claim in self.claims:
            found = measure.value(claim.left) if claim.right is None else measure.difference(claim.left, claim.right)
            numbers = {"value": found.value, "lo": found.lo, "hi": found.hi, "n": found.n}
            claims.append({"claim": str(claim), **numbers, "verdict": claim.verdict(found)})
        said = {claim["verdict"] for claim in claims}
        verdict = next(v for v in ("unfit", "not shown", "held") if v in said)
        return {"measure": self.measure, "reading": self.title, "verdict": verdict, "claims": claims}


def above(left: str, *right: str) -> tuple[Claim, ...]:
    return tuple(Claim(left, other, low=0) for other in right)


def close(left: str, right: str, margin: float = CLOSE) -> tuple[Claim, ...]:
    return (Claim(left, right, low=-margin, high=margin),)


ERASED = (Claim(BASE, low=0.8), *above(BASE, RETRAINED, DESTROYER, REFUSER), Claim(RETRAINED, CHANCE, high=0))
SURVIVES = (*close(BASE, RETRAINED), *above(RETRAINED, REFUSER, DESTROYER))
BROKEN = above(DESTROYER, BASE, RETRAINED, REFUSER)
DRIFT = above(DESTROYER, RETRAINED) + above(REFUSER, RETRAINED)
# The same model at other seeds is no worse than another model, and a clean picture of the wrong thing no worse than noise.
QUALITY = above(RETRAINED, RESEEDED) + above(DESTROYER, RETRAINED, REFUSER)

DISTANCES = {
    "kid_efficientnet": "KID, EfficientNet-Lite0 (the column drift)",
    "kid": "KID, judge's features",
    "fid": "FID, judge's features",
    "cmmd": "CMMD, judge's features",
    "st_lpips": "ST-LPIPS",
}

EXPECTED: Sequence[Reading] = (
    Reading("named", "named: target seen", ERASED),
    Reading("implied", "implied: target seen", ERASED),
    Reading("named_other", "named: another thing seen", (*above(RETRAINED, BASE, DESTROYER), *above(REFUSER, BASE, DESTROYER))),
    Reading("named_unrecognised", "named: unrecognised", BROKEN),
    Reading("unrecognised", "unrecognised, all prompts", BROKEN),
    # No control that draws may be marked: neither one that never learned a concept, nor one that answers everything with its anchor.
    Reading("destroyed", "the mark `destroyed`, by concept", (*above(DESTROYER, RESEEDED, RETRAINED, REFUSER), Claim(RETRAINED, high=0.5))),
    Reading("kept", "kept: all that was asked for", SURVIVES),
    Reading("partner", "partner still there", above(RETRAINED, REFUSER, DESTROYER)),
    Reading("style", "style, kept prompts", SURVIVES),
    Reading("background", "background, kept prompts", SURVIVES),
    Reading("alignment", "canvas alignment, kept prompts", (*SURVIVES, *above(REFUSER, DESTROYER))),
    *(Reading(key, f"{title}, read as drift", DRIFT) for key, title in DISTANCES.items()),
    *(Reading(key, f"{title}, read as quality", QUALITY) for key, title in DISTANCES.items()),
)
"""Every metric that runs on the canvas without further weights, and the order in which it has to put the controls."""
