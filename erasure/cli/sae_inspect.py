"""``erasure sae inspect``: a concept's features, on the terminal and as a page."""

import json as jsonlib
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from .options import Base, Json, Positive, What
from .output import chatty

if TYPE_CHECKING:
    from erasure.methods.itd import ItD, ItDEraser
    from erasure.methods.sae.features import Explained

    from ..concept import Concept

CANVAS_GUIDANCE = 4.0
"""Of the canvas's suites; other models keep their own."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class OnCanvas(Base):
    """The base model; the canvas, whose coder ships, unless another is named."""

    model: str = "canvas"
    """Embedded model ("canvas", "canvas-flow"), hub id, diffusers folder or .safetensors checkpoint."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Coder:
    """The coder, and which features count as the concept's."""

    sae: str = ""
    """Folder of the coder; empty for the one that ships with the canvas."""
    k: Positive | None = None
    """How many of a prompt's strongest features count as its own; as with `erasure erase itd`."""

    def method(self) -> "ItD":
        from erasure.methods.itd import ItD

        return ItD(sae=self.sae) if self.k is None else ItD(sae=self.sae, k=self.k)


def _html(_: Any, out: Path | None) -> None:
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise ValueError(f"{out} is a folder, or lies in none that exists; give the name of an .html file.")


def inspect(
    base: OnCanvas = OnCanvas(),
    what: What = What(),
    coder: Coder = Coder(),
    *,
    out: Annotated[Path | None, Parameter(help="Page to write; none without it.", validator=_html)] = None,
    prompts: Annotated[str | None, Parameter(help="File of prompts or suite to look for top prompts in, beside the concept's own.")] = None,
    top: Annotated[Positive, Parameter(help="Features that the page shows; its table has all.")] = 8,
    images: Annotated[bool, Parameter(help="Make images with a feature scaled down and up.")] = True,
    steps: Annotated[Positive, Parameter(help="Sampling steps of the images.")] = 20,
    seed: Annotated[int, Parameter(help="Seed of the images.", validator=Number(gte=0))] = 0,
    json: Json = False,
) -> None:
    """Show a concept's features: what turns each on, who shares it, and what the model makes with less or more of it."""
    from erasure.methods.sae.features import explain

    concepts = what.concepts(base.model)
    pipe = base.load()
    eraser = coder.method().fit(pipe, concepts)
    found = explain(pipe, eraser, _probes(base.model, concepts, prompts))
    if out is not None:
        from erasure.eval.report.features import write_page

        write_page(out, _page(pipe, eraser, found, base, coder, top, steps if images else 0, seed, chatty(json)))
    if json:
        record = {"concepts": [concept.name for concept in concepts], **_plain(found), "page": None if out is None else str(out)}
        print(jsonlib.dumps(record, indent=2, ensure_ascii=False))
        return
    _print(found)
    if out is not None:
        print(f"page: {out}")


def _probes(model: str, concepts: tuple["Concept", ...], prompts: str | None) -> list[tuple[str, tuple[str, ...]]]:
    """(prompt, names): the canvas's own words in turn, or else the concepts' phrases; and prompts of the user's, of nobody."""
    from erasure.methods.sae.prompts import prompts_of

    from ..models import EMBEDDED

    if model in EMBEDDED:
        from ..canvas.probes import probes

        found = probes()
    else:
        phrases = [(concept, phrase) for concept in concepts for phrase in (*concept.targets, *concept.anchors, *concept.retain) if phrase]
        found = [(text, (phrase,)) for concept, phrase in phrases for text in prompts_of(concept, (phrase,))]
    if prompts is not None:
        from .sae_detect import asked

        found += [(text, ()) for text, _ in asked(prompts, concepts)]
    return [*dict.fromkeys(found)]


def _plain(found: "Explained") -> dict[str, Any]:
    """As JSON has it; a match's tokens as {text, code}."""
    features = []
    for one in found.features:
        matches = [{**m._asdict(), "tokens": [token._asdict() for token in m.tokens]} for m in one.prompts]
        features.append({**asdict(one), "prompts": matches})
    return {"features": features, "spared": [asdict(one) for one in found.spared]}


def _page(
    pipe: Any, eraser: "ItDEraser", found: "Explained", base: Base, coder: Coder, top: int, steps: int, seed: int, progress: bool
) -> dict[str, Any]:
    """What the page shows; ``steps`` 0 is a page without images."""
    from tqdm.auto import tqdm

    from erasure.eval.report.features import strip
    from erasure.families import family_of
    from erasure.methods.sae.features import FACTORS
    from erasure.methods.sae.features import strip as draw

    from ..models import EMBEDDED

    names = " and ".join(concept.name for concept in eraser.concepts)
    plain = _plain(found)
    groups: dict[str, list[int]] = {}
    for one in found.features:
        groups.setdefault(one.hookpoint, []).append(one.index)
    strips: list[dict[str, Any] | None] = [None] * (1 + min(top, len(found.features)))
    if steps:
        asked = [(found.features[0].example, groups), *((one.example, {one.hookpoint: [one.index]}) for one in found.features[:top])]
        guidance: dict[str, Any] = {family_of(pipe).scale: CANVAS_GUIDANCE} if base.model in EMBEDDED else {}
        bar = pipe.progress_bar
        pipe.set_progress_bar_config(disable=True)
        try:
            for i, (prompt, of) in enumerate(tqdm(asked, desc="images", disable=not progress)):
                strips[i] = strip(prompt, list(FACTORS), draw(pipe, eraser, prompt, of, seed=seed, steps=steps, **guidance))
        finally:
            pipe.progress_bar = bar
    for i, one in enumerate(plain["features"]):
        one |= {"shown": i < top, "strip": strips[i + 1] if i < top else None}
    coders = [
        f"{encoder.component}.layers.{switch.layer}, {switch.coder.config.num_latents} latents, {switch.coder.config.k} on at once"
        for encoder, switch in eraser.switches(pipe, family_of(pipe))
    ]
    options = [f"--sae {shlex.quote(coder.sae)}"] if coder.sae else []
    words = [f"--concept {shlex.quote(one.name)}" for one in eraser.concepts]
    command = [f"erasure sae inspect --model {shlex.quote(base.model)}", *words, *options, f"--k {eraser.method.k}", "--out page.html"]
    return {
        **plain,
        "title": f"Features of {names}",
        "concept": names,
        "model": base.model,
        "coders": coders,
        "k": eraser.method.k,
        "together": strips[0],
        "sensitive": any(one.kind == "content" for one in eraser.concepts),
        "command": " ".join(command),
        "facts": {"factors": ", ".join(f"{f:g}" for f in FACTORS), "steps": steps or "no images", "seed": seed}
        | {"prompts read": "words of the fit side of the canvas" if base.model in EMBEDDED else "the concept's phrases"},
    }


def _print(found: "Explained") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def pairs(of: list[tuple[str, float]]) -> Text:
        return Text(", ".join(f"{name or '(no phrase)'} {mean:.2f}" for name, mean in of[:3]) or "-")

    table = Table("feature", "score", "top concepts", "faintly shared with", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    places = {one.hookpoint for one in found.features}
    for one in found.features:
        name = str(one.index) if len(places) == 1 else f"{one.hookpoint}:{one.index}"
        table.add_row(Text(name), f"{one.score:.2f}", pairs(one.concepts), pairs(one.shared))
    console = Console()
    console.print(table)
    if found.spared:
        left = ", ".join(f"{one.index} ({len(one.phrases)})" for one in found.spared[:8])
        more = f" and {len(found.spared) - 8} more" if len(found.spared) > 8 else ""
        words = f"\nLeft on, as retained phrases have them too (how many do): {left}{more}"
        console.print(words, highlight=False, markup=False, soft_wrap=True)
