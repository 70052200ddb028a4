"""Peak memory and time of one gradient through the whole sampler, by number of steps: all activations kept, against steps run again.

    python benchmarks/masking_memory.py                           # into docs/methods/masking.md
    python benchmarks/masking_memory.py --model canvas --steps 1,5

Each case runs in a process of its own, which takes one gradient to warm up and measures the second: the growth of resident memory
over what was resident before it (glibc only). Ratios are full over recomputed, in this one run.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from page import put

from erasure.denoising import Denoising
from erasure.eval.memory import peak_memory
from erasure.families import family_of
from erasure.methods.masking import Minimalist
from erasure.methods.masking.chain import Chain
from erasure.methods.masking.sites import find, hooked
from erasure.models import load_base

PAGE = Path(__file__).parents[1] / "docs" / "methods" / "masking.md"
BATCH = 4
HEAD = "| steps | full, MB | recomputed, MB | ratio | full, s | recomputed, s | ratio |\n|---:|---:|---:|---:|---:|---:|---:|"


def measure(model: str, steps: int, recompute: bool) -> dict[str, float]:
    """Megabytes and seconds of forward and backward for ``BATCH`` images."""
    pipe = load_base(model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    family = family_of(pipe)
    sites = find(pipe, family, ("heads", "neurons", "norms"))
    for _, denoiser in family.parts(pipe):
        denoiser.requires_grad_(False)
    logits = {site.key: torch.full((site.count,), 3.0, requires_grad=True) for site in sites}
    method = Minimalist()
    chain = Chain(Denoising(pipe, family), steps, 1.0, recompute)
    noise = chain.start(["a dagger"] * BATCH, list(range(BATCH)))
    gates: dict[str, torch.Tensor] = {}

    def gradient() -> None:
        gates.update(method.gates(logits, 0, 0))
        chain.final(noise, ["a dagger"] * BATCH).square().mean().backward()

    with hooked(pipe, sites, gates):
        chain.steps = 1
        chain.start(["a dagger"] * BATCH, list(range(BATCH)))
        gradient()
        chain.steps = steps
        chain.start(["a dagger"] * BATCH, list(range(BATCH)))
        ctypes.CDLL(None).malloc_trim(0)  # glibc: what the warm-up freed would be reused unseen
        with peak_memory("cpu") as before:
            pass
        began = time.perf_counter()
        with peak_memory("cpu") as peak:
            gradient()
    assert peak.megabytes is not None and before.megabytes is not None
    return {"mb": round(peak.megabytes - before.megabytes, 1), "s": round(time.perf_counter() - began, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="canvas")
    parser.add_argument("--steps", default="1,5,10,20")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        steps, way = given.case.split(":")
        print(json.dumps(measure(given.model, int(steps), way == "recomputed")))
        return
    rows = []
    for steps in map(int, given.steps.split(",")):
        found = {}
        for way in ("full", "recomputed"):
            command = [sys.executable, __file__, "--model", given.model, "--case", f"{steps}:{way}"]
            found[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        a, b = found["full"], found["recomputed"]
        rows.append(f"| {steps} | {a['mb']} | {b['mb']} | {a['mb'] / b['mb']:.2f} | {a['s']} | {b['s']} | {a['s'] / b['s']:.2f} |")
        print(rows[-1], flush=True)
    put(PAGE, "masking_memory.py", "\n".join([f"{given.model}, {BATCH} images, {torch.get_num_threads()} thread(s).", "", HEAD, *rows]))


if __name__ == "__main__":
    main()
