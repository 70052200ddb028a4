"""``erasure export``: refuse what cannot be, write, read back, compare with the attached eraser, and only then put it in place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import artifact, canary
from ..adapter import AdapterEraser
from ..card import export_card
from ..errors import ArtifactError, Conflict, ErasureError
from ..method import Eraser, RuntimeEraser
from . import delta, full, loader, lora, single
from .folding import Notes, folded
from .staging import Partial, check_out, require_space, staged

FORMATS = {
    "full": "a diffusers folder with the edit folded in, for from_pretrained",
    "delta": "the change of the weights, as one safetensors file",
    "lora": "the change of the weights as LoRA, for load_lora_weights and, of SD 1, SD 2 and SDXL, for web UIs",
    "single": "one checkpoint with the names of the original releases, of SD 1, SD 2 and SDXL",
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EXACT, HALF = 0.05, 0.25
"""How far what was read back may be from the attached eraser, as a share of what the eraser changes: in float32, and in 16 bits."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked for beside artefact, format and folder."""

    dtype: str = "float32"
    """Number format of the written weights; ``full`` is written in the pipeline's own."""
    rank: int | None = None
    """LoRA: rank of every layer."""
    error: float | None = None
    """LoRA: relative Frobenius error that every layer's change must meet, at the smallest rank that does."""


def plan(folder: Path, out: Path, form: str, options: Options) -> dict[str, Any]:
    """What an export would do. Raises, before any base is loaded, where it cannot be."""
    eraser, config = artifact.load_eraser(folder)
    _check_possible(eraser, config, form, options)
    check_out(out)
    names = [c.name for c in eraser.concepts]
    return {"artefact": str(folder), "method": config["method"], "concepts": names, "kind": eraser.kind, "format": form, "out": str(out)}


def export(folder: str | Path, pipe: Any, out: str | Path, form: str, options: Options = Options()) -> dict[str, Any]:
    """Write the artefact of ``folder``, fitted on the bare base ``pipe``, to the folder ``out`` in a format of `FORMATS`.

    The output is read back by the tool that it is for, and its canary compared with the attached eraser's; gives a report. Errors:
    what cannot be expressed, a wrong base, a folder of something else, too little space, and an output that does not erase raise.
    """
    folder, out = Path(folder), Path(out)
    plan(folder, out, form, options)
    if any(getattr(module, "peft_config", None) for module in pipe.components.values()):
        raise Conflict("the base has LoRA adapters loaded; export from the base that the artefact was fitted on, without them")
    eraser, _ = artifact.check(folder, pipe, always_canary=True)
    config = artifact.read_config(folder)
    report: dict[str, Any] = {"artefact": str(folder), "format": form, "out": str(out)}
    with staged(out) as partial:
        if isinstance(eraser, RuntimeEraser):
            notes = loader.write(folder, partial, pipe, config)
        else:
            notes = _write(form, eraser, pipe, partial, out.name, config, options)
        report |= notes.report
        files = partial.finish(config, report, export_card(config, form, notes.usage))
    return report | {"files": files, "megabytes": round(sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e6, 3)}


def _check_possible(eraser: Eraser, config: Mapping[str, Any], form: str, options: Options) -> None:
    if form not in FORMATS:
        raise ErasureError(f"no format {form!r}; choose one of {', '.join(FORMATS)}")
    if options.dtype not in DTYPES:
        raise ErasureError(f"no dtype {options.dtype!r}; choose one of {', '.join(DTYPES)}")
    if form == "lora":
        lora.check_options(options.rank, options.error, isinstance(eraser, AdapterEraser))
    elif options.rank is not None or options.error is not None:
        raise ErasureError(f"rank and error belong to the format lora, not to {form}")
    if isinstance(eraser, RuntimeEraser) and form != "full":
        raise ErasureError(
            f"{config['method']} acts while the pipeline runs: it changes no weights that a {form} file could hold. Export it with "
            "--format full (the artefact with a small loader), or use a method of kind weights or adapter (see `erasure methods`)"
        )
    if form == "single":
        single.check_family(config["base"]["family"])


def _write(form: str, eraser: Eraser, pipe: Any, partial: Partial, name: str, config: Mapping[str, Any], options: Options) -> Notes:
    """Write a format, and hold what it reads back as against the attached eraser."""
    new, dtype, reference = folded(eraser, pipe), pipe.dtype if form == "full" else DTYPES[options.dtype], _Reference(eraser, pipe)
    require_space(partial, pipe, new, form, dtype)
    match form:
        case "full":
            notes = full.write(new, pipe, partial.path)
        case "delta":
            notes = delta.write(new, pipe, partial.path, config, dtype)
        case "lora":
            notes = lora.write(eraser, new, pipe, partial.path, name, options.rank, options.error, dtype)
        case _:
            notes = single.write(new, pipe, partial.path, name, config, dtype)
    exact = EXACT if dtype == torch.float32 else HALF
    limit = lora.DEVIATION if form == "lora" and not isinstance(eraser, AdapterEraser) else exact
    for what, read_back in notes.checks.items():
        share = reference.deviation(read_back)
        if not share <= limit:
            raise ArtifactError(
                f"{what} was written and read back, and differs from the attached eraser by {share:.1%} of what the eraser changes (limit "
                f"{limit:.0%}); nothing was kept. {notes.remedy}"
            )
        notes.report.setdefault("deviation", {})[what] = round(share, 6)
    return notes


class _Reference:
    """What the canary prompt gives with the eraser attached, and how much that changes."""

    def __init__(self, eraser: Eraser, pipe: Any) -> None:
        self.prompt, self.steps = canary.prompts(eraser)[0], canary.steps_of(eraser)
        self.base = canary.latents(pipe, self.prompt, self.steps)
        with eraser.attach(pipe):
            self.attached = canary.latents(pipe, self.prompt, self.steps)

    def deviation(self, read_back: Any) -> float:
        """Distance of a pipeline's latents from the attached eraser's, as a share of the distance between that and the base."""
        with read_back() as pipe:
            made: Tensor = canary.latents(pipe, self.prompt, self.steps)
        return float((made - self.attached).norm() / (self.base - self.attached).norm())
