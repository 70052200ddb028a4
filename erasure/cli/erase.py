"""``erasure erase METHOD``: fit a method and save the artefact."""

import json as jsonlib
import time
from collections.abc import Callable
from typing import Annotated

from cyclopts import App, Parameter

from ..errors import ErasureError
from ..method import ErasureMethod, Run
from ..registry import methods
from .options import Base, What

app = App(
    name="erase",
    help="Fit a method on concepts and save the artefact; each method's own settings are flags of its sub-command.",
    help_epilogue=(
        "Examples:\n\nerasure erase uce --model canvas --concept dagger --out out/dagger-uce\n\n"
        "erasure erase safree --model canvas --target bomb --target explosive --anchor '' --out out/bomb --alpha 0.02"
    ),
)


Out = Annotated[str, Parameter(help="Folder of the artefact.")]
Seed = Annotated[int, Parameter(help="Seed of the fit.")]
Json = Annotated[bool, Parameter(help="Print JSON.", negative=())]
Dry = Annotated[bool, Parameter(help="Print the plan and stop.", negative=())]


def erase(method: ErasureMethod, base: Base, what: What, out: str, seed: int, json: bool, dry_run: bool) -> None:
    """Fit, save, and say where the artefact is."""
    from .. import artifact

    concepts = what.concepts(base.model)
    if dry_run:
        plan = {"method": method.name, "config": method.config(), "concepts": [c.to_dict() for c in concepts], "out": out}
        print(jsonlib.dumps(plan, indent=2, ensure_ascii=False))
        return
    pipe = base.load()
    started = time.perf_counter()
    eraser = method.fit(pipe, concepts, run=Run(seed=seed))
    seconds = time.perf_counter() - started
    folder = artifact.save(eraser, out, pipe=pipe, base_id=base.model, seed=seed, cost={"fit_seconds": round(seconds, 3)})
    _, config = artifact.load_eraser(folder)
    if json:
        print(jsonlib.dumps(config, indent=2, ensure_ascii=False))
        return
    names = ", ".join(c.name for c in concepts)
    print(f"{names}: fitted by {method.name} in {seconds:.2f} s, saved to {folder}; canary moves by {config['canary']['delta']:.1%}")


def _command(cls: type[ErasureMethod]) -> Callable[..., None]:
    """A command whose flags are the method's fields; their docstrings are its help."""

    default = cls()

    def command(
        base: Base,
        config: ErasureMethod = default,
        what: What = What(),
        *,
        out: Out,
        seed: Seed = 0,
        json: Json = False,
        dry_run: Dry = False,
    ) -> None:
        erase(config, base, what, out, seed, json, dry_run)

    command.__doc__ = (cls.__doc__ or "").strip().splitlines()[0]
    command.__annotations__["config"] = Annotated[cls, Parameter(name="*", group="Method")]
    return command


for _name in methods.names():
    try:
        app.command(_command(methods.get(_name)), name=_name)
    except ErasureError:
        continue  # a broken plug-in: `erasure methods` lists it with its error
