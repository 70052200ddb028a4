"""A protocol fixes everything that two numbers must share before they may be compared."""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .judges import judge_sha256
from .metrics.extractors import EXTRACTORS

SCORING = ("judge", "judge_sha256", "features", "features_sha256")
"""Fields that decide scores only: images made under other ones can be scored again."""
SHIPPED = "shipped"
"""As a protocol's scheduler: the model's own."""


class Protocol(BaseModel):
    """How images are made and who judges them. Unknown keys are errors; hashes of weight files are filled in and checked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheduler: str
    """Class name in diffusers, or ``SHIPPED``."""
    scheduler_config: dict[str, Any] = {}
    """Changes to the scheduler that the model ships with; empty means as shipped."""
    steps: int = Field(gt=0)
    guidance: float = Field(ge=0)
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    negative_prompt: str | None = None
    true_cfg: float | None = Field(default=None, gt=1)
    """Guidance away from the negative prompt (an empty one, if none is given) in pipelines that have it beside their own, as FLUX.1."""
    frames: int | None = Field(default=None, gt=0)
    """Frames of a video; None where a row is one image."""
    judge: str | None = None
    """The canvas judge that calls the images; None where recipes score them."""
    judge_sha256: str = ""
    features: str = "efficientnet-lite0"
    features_sha256: str = ""

    @model_validator(mode="before")
    @classmethod
    def _pin(cls, data: Any) -> Any:
        """Record the files that are installed; a recorded hash that differs from the file is an error."""
        if not isinstance(data, dict):
            return data  # reported by the validation that follows
        for field, actual in _weight_hashes(data).items():
            if data.get(field) and data[field] != actual:
                raise ValueError(f"{field} is {data[field]} in the protocol, but the installed file has {actual}")
            data = {**data, field: actual}
        return data

    def changed(self, **changes: Any) -> "Protocol":
        """A copy with other values, checked like the first; its hash differs, so `compare` will not rank the two together."""
        return Protocol.model_validate({**self.model_dump(), **changes})

    @property
    def hash(self) -> str:
        """Identity of the whole protocol: images and judging."""
        return digest(self.model_dump(exclude=self._unset))

    @property
    def image_hash(self) -> str:
        """Identity of what decides the images."""
        return digest(self.model_dump(exclude={*SCORING, *self._unset}))

    @property
    def _unset(self) -> set[str]:
        """Fields that came after the first results and say nothing here; left out, so that hashes of old results stay."""
        return {field for field in ("frames", "true_cfg") if getattr(self, field) is None}


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is for flow matching."""
    config = getattr(scheduler, "config", {})
    return (
        "FlowMatch" in type(scheduler).__name__ or bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"
    )


def digest(data: Any) -> str:
    """The first 16 hex digits of the SHA-256 of data as canonical JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def _weight_hashes(data: dict[str, Any]) -> dict[str, str]:
    features = data.get("features", "efficientnet-lite0")
    if not isinstance(features, str) or features not in EXTRACTORS:
        raise ValueError(f"unknown feature extractor {features!r}; there are: {', '.join(EXTRACTORS)}")
    found = {"features_sha256": EXTRACTORS[features]}
    if isinstance(data.get("judge"), str):  # anything else is reported by the field itself
        found["judge_sha256"] = judge_sha256(data["judge"])
    return found
