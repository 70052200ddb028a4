"""Seconds and peak memory of one optimiser step of every trained method, at the size of SD 1.5, beside a plain LoRA step.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py
    OMP_NUM_THREADS=1 python benchmarks/train_step.py --cases esd "esd, LoRA" --steps 3   # the page then has these alone
    python benchmarks/train_step.py --canvas --cases esd    # a look on the canvas; writes no file

Random weights, float32, batch 1, 256 px. Every case fits by its own code in a process of its own, from the registry's class and its values
for the paper, with few samples beforehand; a callback times the optimiser steps, the first of which warms up and is dropped. A plain LoRA
case runs before and after each of them, and a ratio is the median step over the mean of these two neighbours. Peak memory is what the
process held while it took the timed steps. A case that would not fit into the memory that is free is left out, and said so.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from overhead import canvas, environment, sd15
from page import put
from torch import Tensor

from erasure.callbacks import Callback
from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.eval.memory import peak_memory
from erasure.families import family_of
from erasure.method import ErasureMethod, Run
from erasure.registry import methods
from erasure.trained import LowRankMethod, Session
from erasure.training import Loss, Training

ROOT = Path(__file__).parent.parent
JSON, PAGE = ROOT / "docs" / "benchmarks" / "train_step.json", ROOT / "docs" / "performance.md"
CONCEPT = Concept("dagger", targets=("dagger",), anchors=("cat",), retain=("boat",))
PLAIN, RANK, BAR = "plain LoRA", 4, 2.2
BARS = {"esd, LoRA": BAR, "safety_dpo": BAR}
"""Most that a step may cost, relative to the plain one."""
SMALL = {"images": 2, "sampling_steps": 2, "size": 256, "batch": 1, "accumulation": 1, "retain_batch": 1, "warmup": 0, "states": "base"}
"""What a fit draws beforehand is no part of a step; of fields that a method has not, nothing is said."""
OWN: dict[str, dict[str, Any]] = {"minimalist": {"sampling_steps": 5}}
"""What of the above is part of a step: gradients run through the whole sampler."""
ATTEMPTS: dict[str, dict[str, dict[str, Any]]] = {"adv_unlearn": {"fast attack": {"attack_steps": 1}}}
"""Further settings of a method that make another step."""
ACTIVATIONS, RESERVE = 4e9, 2e9
"""Bytes for activations and what libraries take, and those that stay free for others."""


@dataclass(frozen=True, kw_only=True)
class Plain(LowRankMethod):
    """What everyone does: a LoRA on the attention layers learns the noise in an image of a prompt."""

    name: ClassVar[str] = PLAIN
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "part": "full", "steps": 1, "lr": 1e-4, "batch": 1, "guidance": 1.0, "sampling_steps": 2, "retain_scale": 0.0, "expand": False,
        },
    }  # fmt: skip

    def objective(self, session: Session) -> Loss:
        of, pool = session.denoising, session.pool(["a cat"], 2, steps=2, guidance=1.0, batch=2)

        def loss(step: int, generator: torch.Generator) -> Tensor:
            some = pool.noised(of, self.batch, generator)
            return (of.predict(some.x_t, some.t, some.prompts) - some.target).square().mean()

        return loss


@dataclass
class Watch(Callback):
    """Seconds of each optimiser step, and the peak of memory over all but the first."""

    clock: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    megabytes: float | None = None
    last: float = 0.0

    def start(self, run: Training) -> None:
        self.opened = ExitStack()
        self.last = self.clock()

    def step(self, run: Training) -> None:
        self.seconds.append(self.clock() - self.last)
        if run.step == 1:
            self.peak = self.opened.enter_context(peak_memory("cpu"))
        if run.step == run.steps:
            self.opened.close()
            self.megabytes = self.peak.megabytes
        self.last = self.clock()


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (method, settings): every class of the registry that trains by steps, as it comes, and as a LoRA where it can be one."""
    found = {}
    for name in methods.names():
        known = {f.name for f in fields(methods.get(name))}
        if not methods.get(name).trained or not {"steps", "lr"} <= known:
            continue
        found[name] = (name, {key: value for key, value in SMALL.items() if key in known} | OWN.get(name, {}))
        if issubclass(methods.get(name), LowRankMethod) and methods.get(name).rank is None:
            found[f"{name}, LoRA"] = (name, found[name][1] | {"rank": RANK})
        for title, more in ATTEMPTS.get(name, {}).items():
            found[f"{name}, {title}"] = (name, found[name][1] | more)
    return found


def left_out() -> dict[str, str]:
    """Methods that are said to depend on a fit seed, and take no optimiser step."""
    return {name: "takes no optimiser steps" for name in methods.names() if methods.get(name).trained and name not in cases()}


def configured(case: str, steps: int, on_canvas: bool) -> ErasureMethod:
    if case == PLAIN:
        layers = ("to_q", "to_k", "to_v", "to_out")
        return Plain(rank=RANK, layers=layers, steps=steps, size=None if on_canvas else 256)
    name, settings = cases()[case]
    return methods.get(name).from_config(settings | {"steps": steps} | ({"size": None} if on_canvas and "size" in settings else {}))


def needed(pipe: Any, method: ErasureMethod) -> float:
    """Bytes that training takes beyond the model: originals, gradient, Adam's two moments and one mask of what is trained, activations."""
    if not hasattr(method, "tuned"):
        return ACTIVATIONS
    with method.tuned(pipe, family_of(pipe), 0) as tuned:
        numbers = sum(parameter.numel() for parameter in tuned.parameters.values())
    return numbers * (4 * 4 + 1) + ACTIVATIONS  # ``tuned`` itself took the originals, and gave them back


def available() -> float:
    """Bytes that are free for a new process; unlimited where the system does not say."""
    found = Path("/proc/meminfo")
    lines = dict(line.split(":") for line in found.read_text().splitlines()) if found.exists() else {}
    return 1024 * float(lines["MemAvailable"].split()[0]) if "MemAvailable" in lines else float("inf")


def measure(case: str, steps: int, on_canvas: bool, clock: str) -> dict[str, Any]:
    """Seconds of each timed step, and megabytes; or why there are none."""
    if Path("/proc/self/oom_score_adj").exists():
        Path("/proc/self/oom_score_adj").write_text("1000")  # should memory run out, this process goes first
    torch.manual_seed(0)
    pipe, method = (canvas if on_canvas else sd15)(torch.float32), configured(case, steps + 1, on_canvas)
    pipe.set_progress_bar_config(disable=True)
    if (more := needed(pipe, method) + RESERVE) > (free := available()):
        return {"left_out": f"training would take about {more / 1e9:.0f} GB more, and {free / 1e9:.0f} GB are free"}
    watch = Watch(time.process_time if clock == "cpu" else time.perf_counter)
    try:
        method.fit(pipe, [CONCEPT], run=Run(progress=False, callbacks=(watch,)))
    except ErasureError as error:
        if len(watch.seconds) <= steps:  # after its last step, a fit of random weights may find that nothing came of it
            return {"left_out": str(error)}
    return {"seconds": watch.seconds[1:], "megabytes": watch.megabytes}


def child(case: str, given: argparse.Namespace) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    command = [sys.executable, __file__, "--case", case, "--steps", str(given.steps), "--clock", given.clock]
    done = subprocess.run([*command, *(["--canvas"] if given.canvas else [])], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        killed = f"killed by signal {-done.returncode}" if done.returncode < 0 else ""
        return {"left_out": killed or (said[-1] if said else f"exit code {done.returncode}")}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(names: list[str], given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a case, each between two plain ones."""
    before = child(PLAIN, given)
    if "left_out" in before:
        raise SystemExit(f"{PLAIN}: {before['left_out']}")
    rows, plains = [], [before]
    for name in names:
        found = child(name, given)
        if "left_out" in found:
            rows.append({"case": name, **found})
        else:
            after = child(PLAIN, given)
            if "left_out" in after:
                raise SystemExit(f"{PLAIN}: {after['left_out']}")
            beside, step = [statistics.median(of["seconds"]) for of in (plains[-1], after)], statistics.median(found["seconds"])
            ratio = step / statistics.fmean(beside)
            rows.append({"case": name, **found, "step": step, "plain": beside, "ratio": ratio, "bar": BARS.get(name)})
            plains.append(after)
        print(json.dumps(rows[-1]), flush=True)
    middle = [statistics.median(plain["seconds"]) for plain in plains]
    first = {
        "case": PLAIN, "seconds": middle, "step": statistics.median(middle), "ratio": 1.0, "bar": None,
        "megabytes": statistics.median(plain["megabytes"] for plain in plains),
    }  # fmt: skip
    return [first, *rows, *({"case": name, "left_out": why} for name, why in left_out().items())]


def table(result: dict[str, Any]) -> str:
    plain, rows = result["rows"][0], [row for row in result["rows"] if "left_out" not in row]
    lines = [
        f"{result['model']}, float32, batch 1, {result['steps']} timed step(s) a case by {result['clock']} clock, "
        f"{result['environment']['threads']} thread(s), {result['environment']['cpu']}, load {result['load']:.1f} at the start. "
        f"The plain step took {min(plain['seconds']):.2f} to {max(plain['seconds']):.2f} s in {len(plain['seconds'])} processes.",
        "",
        "| case | seconds a step | x plain | peak MB | bar | met |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        bar, met = ("", "") if row["bar"] is None else (f"{row['bar']:.1f}", "yes" if row["ratio"] <= row["bar"] else "no")
        lines.append(f"| {row['case']} | {row['step']:.2f} | {row['ratio']:.2f} | {row['megabytes']:,.0f} | {bar} | {met} |")
    lines += ["", *(f"* Left out: {row['case']}: {row['left_out']}." for row in result["rows"] if "left_out" in row)]
    return "\n".join(lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="names of cases; all, if not given")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="time that passes, or time of the process")
    parser.add_argument("--canvas", action="store_true", help="the canvas instead of the size of SD 1.5; writes no file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(given.case, given.steps, given.canvas, given.clock)))
        return
    if strange := set(given.cases or ()) - set(cases()):
        parser.error(f"no case {', '.join(sorted(strange))}; there are: {', '.join(cases())}")
    head = {"model": "canvas" if given.canvas else "SD 1.5 by its sizes, 256 px", "steps": given.steps, "clock": given.clock}
    head |= {"load": os.getloadavg()[0], "environment": environment()}
    result = {**head, "rows": measured(given.cases or list(cases()), given)}
    print(table(result))
    if not given.canvas:
        JSON.write_text(json.dumps(result, indent=1) + "\n")
        put(PAGE, "train_step.py", table(result))


if __name__ == "__main__":
    main()
