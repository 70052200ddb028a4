"""``erasure erase METHOD``: fit a method and save the artefact."""

import inspect
import json as jsonlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Group, Parameter

from ..errors import ErasureError
from ..registry import methods
from .examples import epilogue, method_epilogue
from .options import Base, DryRun, Json, Out, Seed, What
from .output import chatty

if TYPE_CHECKING:
    from ..concept import Concept
    from ..method import ErasureMethod

app = App(name="erase", help_format="plaintext", help_epilogue=epilogue("erase"))


def erase(method: "ErasureMethod", base: Base, what: What, out: Path, seed: int, json: bool, dry_run: bool) -> None:
    """Fit, save, and say where the artefact is; of several processes the first one does the latter two."""
    from erasure.eval.engines.ranks import Rank

    from .. import artifact
    from ..method import Run

    concepts = what.concepts(base.model)
    artifact.check_target(out)
    _check_same(out, method, concepts)
    if dry_run:
        plan = {"method": method.name, "config": method.config(), "concepts": [c.to_dict() for c in concepts], "out": str(out)}
        print(jsonlib.dumps(plan, indent=2, ensure_ascii=False))
        return
    pipe = base.load()
    started = time.perf_counter()
    training = out.with_name(f".{out.name}.training")  # a killed fit goes on from there
    eraser = method.fit(pipe, concepts, run=Run(seed=seed, progress=chatty(json), checkpoint=training if method.trained else None))
    seconds = time.perf_counter() - started
    folder = artifact.save(eraser, out, pipe=pipe, base_id=base.model, seed=seed, cost={"fit_seconds": round(seconds, 3)})
    if not Rank.here().first:
        return
    shutil.rmtree(training, ignore_errors=True)
    config = artifact.read_config(folder)
    if json:
        print(jsonlib.dumps(config, indent=2, ensure_ascii=False))
        return
    names = ", ".join(c.name for c in concepts)
    print(f"{names}: fitted by {method.name} in {seconds:.2f} s, saved to {folder}; canary moves by {config['canary']['delta']:.1%}")


def _check_same(out: Path, method: "ErasureMethod", concepts: "tuple[Concept, ...]") -> None:
    """An artefact may be fitted again; that of another method or concept is not overwritten."""
    from .. import artifact

    if not (out / artifact.CONFIG).exists():
        return
    there = artifact.read_config(out)
    theirs, ours = [c.get("name") for c in there["concepts"]], [c.name for c in concepts]
    if (there["method"], theirs) != (method.name, ours):
        raise ErasureError(
            f"{out} holds an artefact of {there['method']} on {', '.join(map(str, theirs))}: choose another --out, or remove that folder"
        )


def _command(cls: "type[ErasureMethod]") -> Callable[..., None]:
    """A command whose flags are the method's fields; their docstrings are its help."""
    default = cls()

    def command(
        base: Base,
        config: Any = default,
        what: What = What(),
        *,
        out: Out,
        seed: Seed = 0,
        json: Json = False,
        dry_run: DryRun = False,
    ) -> None:
        try:
            erase(config, base, what, out, seed, json, dry_run)
        finally:
            _leave()

    group = Group("Method", help=inspect.getdoc(cls) or "", sort_key=1)
    command.__annotations__["config"] = Annotated[cls, Parameter(name="*", group=group)]
    return command


def _leave() -> None:
    """Close the group of the processes that trained together, if there is one: left open, it warns at exit."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


PREFIX = "fit_"
"""Before a method's name, so that none of them meets another name of this module."""


def __getattr__(name: str) -> Callable[..., None]:
    """The command of a method, made when it is asked for: a list of methods loads none of them, and a broken one breaks no other."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _command(methods.get(name.removeprefix(PREFIX)))


for _name in methods.names():
    _line = methods.builtin[_name].summary if _name in methods.builtin else f"Plug-in: {methods.plugins[_name].value}"
    app.command(f"{__name__}:{PREFIX}{_name}", name=_name, help=_line, help_epilogue=method_epilogue(_name))
