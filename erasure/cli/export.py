"""``erasure export``: an artefact in a form that other tools load."""

import json as jsonlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from .options import Base, DryRun, Folder, Json

Dtype = Literal["float32", "float16", "bfloat16"]
Artefact = Annotated[Path, Parameter(help="Folder that `erasure erase` wrote.")]
Form = Annotated[
    Literal["full", "delta", "lora", "single"],
    Parameter(
        help="full: a diffusers folder with the edit folded in (of a runtime eraser: the artefact with a small loader). "
        "delta: the change of the weights. lora: the change as LoRA, for diffusers and web UIs. "
        "single: one checkpoint for web UIs (SD 1, SD 2, SDXL)."
    ),
]
Rank = Annotated[int | None, Parameter(help="LoRA: rank of every layer.", validator=Number(gte=1))]
Error = Annotated[
    float | None,
    Parameter(
        help="LoRA: share of each layer's change that may be lost (relative Frobenius error); the rank is the smallest that meets it.",
        validator=Number(gt=0, lt=1),
    ),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class From:
    """The base model, in the format that the export asks for."""

    model: str
    """Embedded model ("canvas", "canvas-flow"), hub id, diffusers folder or .safetensors checkpoint."""
    base_config: str | None = None
    """Folder with the configuration of a single-file checkpoint."""
    device: str | None = None
    """cuda where there is one, else cpu."""
    dtype: Dtype | None = None
    """Number format of what is written; float16 for single, else float32."""


def export(
    artefact: Artefact,
    base: From,
    *,
    out: Annotated[Folder, Parameter(help="Folder of the export; it appears whole or not at all.")],
    format: Form,
    rank: Rank = None,
    error: Error = None,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write an artefact in a form that other tools load, and compare that with the attached eraser."""
    from ..export import Options, plan
    from ..export import export as write

    written: Dtype = base.dtype or ("float16" if format == "single" else "float32")
    options = Options(dtype=written, rank=rank, error=error)
    planned = plan(artefact, out, format, options) | {"dtype": written}
    if dry_run:
        print(jsonlib.dumps(planned, indent=2, ensure_ascii=False))
        return
    # Only a full folder holds the base's weights as they are loaded; the others are worked out in float32.
    loaded = written if format == "full" else "float32"
    pipe = Base(model=base.model, base_config=base.base_config, device=base.device, dtype=loaded).load()
    report = write(artefact, pipe, out, format, options)
    if json:
        print(jsonlib.dumps(report, indent=2, ensure_ascii=False))
        return
    print("\n".join(f"{key}: {_line(value)}" for key, value in report.items()))
    print(f"ok: {out} was read back and erases as the artefact does")


def _line(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
