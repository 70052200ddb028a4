"""What the harness costs beside the bare pipeline loop, and how much memory scoring takes as the images become many.

    python benchmarks/harness.py
    python benchmarks/harness.py --quick

Overhead: every round makes the same images three ways, in an order that turns by one each round: pipeline calls alone; the bare loop, which
also saves each image as PNG, as any script does; and the harness, which opens a cell, puts the pipeline under its protocol, draws, checks
for NaN and black, writes, hashes and publishes whole chunks. A ratio is the median over rounds of the harness's time by that of the same
round, so that drift of the machine cancels; intervals are 95 % bootstraps over rounds. Both clocks are given: processor time leaves out
what others do on the machine, and waiting for the disk.

Memory: synthetic images are written into one cell; for each n a fresh process scores the first n in one pass (canvas judge, FID by sums
against the base's images), and says its peak of resident memory, and that of its largest reading worker. Growth by image is held against
the size of an image, which any list of images would show.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from overhead import environment

from erasure.concept import Concept
from erasure.eval.generate import generate, under
from erasure.eval.memory import peak_memory
from erasure.eval.protocol import Protocol
from erasure.eval.rows import Row
from erasure.eval.store import Cell, Settings, chunked
from erasure.eval.suite import load_suite
from erasure.models import load_base
from erasure.testing.tiny import sd1

JSON = Path(__file__).parent.parent / "docs" / "benchmarks" / "harness.json"
BAR = 1.05
"""Most that the harness may take, relative to the bare loop."""
FLAT = 1.1
"""Most that the peak at the largest n may be, relative to that at the smallest."""
BATCH, STEPS, SIZE = 8, 10, 64
CHUNKS = {"canvas": 2, "tiny": 8}
"""Of a round, so that each way takes more than a second."""
PIPES: dict[str, Callable[[], Any]] = {"canvas": lambda: load_base("canvas", device="cpu"), "tiny": sd1}
CASES = ("calls", "loop", "harness")
Clocks = dict[str, float]


def overhead(name: str, rounds: int) -> dict[str, Any]:
    """A pipeline's row of the first table; one more round comes first, to warm up, and is dropped."""
    pipe, suite = PIPES[name](), load_suite("canvas-demo")
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    protocol = suite.protocol.changed(steps=STEPS, height=size, width=size)
    rows = suite.rows(Concept("dagger"))[: BATCH * CHUNKS[name]]
    ways = {"calls": partial(bare, saved=False), "loop": partial(bare, saved=True), "harness": harness}
    found: list[dict[str, Clocks]] = []
    for turn in range(rounds + 1):
        start, times = turn % len(CASES), dict[str, Clocks]()
        for case in (*CASES[start:], *CASES[:start]):
            with tempfile.TemporaryDirectory() as folder:
                times[case] = ways[case](pipe, protocol, rows, Path(folder))
        found.append(times)
    found = found[1:]
    row: dict[str, Any] = {"model": name, "size": size, "steps": STEPS, "batch": BATCH, "images": len(rows), "rounds": rounds}
    row["ms_per_image"] = {c: round(1000 * statistics.median(t[c]["wall"] for t in found) / len(rows), 2) for c in CASES}
    for against in ("loop", "calls"):
        row[f"over_{against}"] = {clock: ratio([t["harness"][clock] / t[against][clock] for t in found]) for clock in ("wall", "cpu")}
    return row | {"bar": BAR, "met": row["over_loop"]["wall"]["ratio"] <= BAR}


def bare(pipe: Any, protocol: Protocol, rows: Sequence[Row], folder: Path, *, saved: bool) -> Clocks:
    """The pipeline, called chunk by chunk; with or without files."""
    from PIL import Image

    with under(pipe, protocol):
        started = clocks()
        for chunk in chunked(rows, BATCH):
            images = draw_bare(pipe, chunk.rows, protocol)
            if saved:
                for row, image in zip(chunk.rows, images, strict=True):
                    Image.fromarray((image * 255).round().astype("uint8")).save(folder / f"{row.id}.png")
        return since(started)


def draw_bare(pipe: Any, rows: Sequence[Row], protocol: Protocol) -> Any:
    return pipe(
        prompt=[row.prompt for row in rows],
        generator=[torch.Generator("cpu").manual_seed(row.seed) for row in rows],
        num_inference_steps=protocol.steps,
        guidance_scale=protocol.guidance,
        height=protocol.height,
        width=protocol.width,
        output_type="np",
    ).images


def harness(pipe: Any, protocol: Protocol, rows: Sequence[Row], folder: Path) -> Clocks:
    """All that `erasure generate` does once the model is loaded."""
    started = clocks()
    settings = Settings.of(rows, protocol, eraser="base", model="benchmark", batch_size=BATCH)
    generate(pipe, Cell.open(folder, rows, settings), protocol, progress=False)
    return since(started)


def clocks() -> Clocks:
    return {"wall": time.perf_counter(), "cpu": time.process_time()}


def since(started: Clocks) -> Clocks:
    return {name: now - started[name] for name, now in clocks().items()}


def ratio(values: Sequence[float], draws: int = 2000) -> dict[str, float]:
    """Median with the 95 % bootstrap over rounds."""
    dice = random.Random(0)
    drawn = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(draws))
    low, high = drawn[round(0.025 * (draws - 1))], drawn[round(0.975 * (draws - 1))]
    return {"ratio": round(statistics.median(values), 4), "low": round(low, 4), "high": round(high, 4)}


def synthetic(n: int) -> list[Row]:
    return [Row(f"row-{i:06d}", "other", f"synthetic prompt {i}", i, ("cat",)) for i in range(n)]


def write(folder: Path, n: int, chunk: int) -> None:
    """A cell of n coarse random images, chunk by chunk."""
    rows = synthetic(n)
    protocol = load_suite("canvas-demo").protocol
    cell = Cell.open(folder, rows, Settings.of(rows, protocol, eraser="base", model="synthetic", batch_size=chunk))
    for part in cell.chunks:
        coarse = torch.rand(len(part.rows), 3, 8, 8, generator=torch.Generator().manual_seed(part.index))
        cell.write(part, torch.nn.functional.interpolate(coarse, SIZE), 0.0)


def scored(folder: Path, n: int, chunk: int) -> dict[str, Any]:
    """Peak memory and time of a pass over the first n images; runs in a process of its own."""
    from resource import RUSAGE_CHILDREN, getrusage

    from erasure.eval.judges import judge
    from erasure.eval.metrics.base import Panel
    from erasure.eval.metrics.distances import FID
    from erasure.eval.scoring import Scorers, scan

    torch.set_num_threads(1)
    rows = synthetic(n)
    cell = Cell(folder, tuple(rows), chunked(rows, chunk))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 8, 8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    scorers = Scorers(Concept("dagger"), judge("canvas/judge_dev"), panel=Panel([FID(features=features)]))
    started = time.perf_counter()
    with peak_memory("cpu") as peak:
        found = scan(cell, scorers, cell, progress=False)
    assert len(found.samples) == n
    seconds = time.perf_counter() - started
    worker = getrusage(RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    numbers = {"peak_mb": round(peak.megabytes or 0, 1), "worker_mb": round(worker, 1), "seconds": round(seconds, 1)}
    return {"images": n, **numbers, "ms_per_image": round(1000 * seconds / n, 2)}


def memory(sizes: Sequence[int]) -> dict[str, Any]:
    """The second table: a fresh process for each n, so that none inherits another's peak."""
    with tempfile.TemporaryDirectory() as place:
        folder, chunk = Path(place) / "cell", min(250, min(sizes))
        write(folder, max(sizes), chunk)
        rows = []
        for n in sizes:
            # Not by multiprocessing, whose way of starting processes the reading workers would inherit.
            command = [sys.executable, __file__, "--score", str(folder), str(n), str(chunk)]
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    first, last = rows[0], rows[-1]
    growth = 1e3 * (last["peak_mb"] - first["peak_mb"]) / (last["images"] - first["images"])
    times = last["peak_mb"] / first["peak_mb"]
    held = {"kb_per_image": round(growth, 2), "image_kb": 3 * SIZE * SIZE / 1e3, "ratio": round(times, 3)}
    return {"size": SIZE, "rows": rows, "growth": held, "bar": FLAT, "met": times <= FLAT}


def tables(result: dict[str, Any]) -> str:
    """Both tables as Markdown."""

    def interval(of: dict[str, float]) -> str:
        return f"{of['ratio']:.3f} ({of['low']:.3f} to {of['high']:.3f})"

    lines = ["| pipeline | ms an image: calls | bare loop | harness | harness / loop, wall | cpu | harness / calls, wall | under 5 % |"]
    lines.append("|---|---:|---:|---:|---|---|---|---|")
    for row in result["overhead"]:
        times = " | ".join(f"{row['ms_per_image'][case]:.1f}" for case in CASES)
        ratios = " | ".join(interval(of) for of in (row["over_loop"]["wall"], row["over_loop"]["cpu"], row["over_calls"]["wall"]))
        lines.append(f"| {row['model']}, {row['size']} px | {times} | {ratios} | {'yes' if row['met'] else 'no'} |")
    held = result["memory"]
    lines += ["", "| images | peak, MB | largest worker, MB | ms an image |", "|---:|---:|---:|---:|"]
    lines += [f"| {r['images']:,} | {r['peak_mb']:.0f} | {r['worker_mb']:.0f} | {r['ms_per_image']:.1f} |" for r in held["rows"]]
    growth = held["growth"]
    lines += ["", f"Growth: {growth['kb_per_image']} KB an image, which has {growth['image_kb']} KB as bytes; x {growth['ratio']} in all."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, help="rounds of a pipeline (12)")
    parser.add_argument("--images", type=int, nargs="+", help="how many images are scored (1000 3000 10000 30000)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, 200 and 1000 images; writes no file")
    parser.add_argument("--score", nargs=3, metavar=("FOLDER", "N", "CHUNK"), help="what the processes of the second table are asked")
    arguments = parser.parse_args()
    if arguments.score:
        folder, n, chunk = arguments.score
        print(json.dumps(scored(Path(folder), int(n), int(chunk))))
        return
    rounds = arguments.rounds or (3 if arguments.quick else 12)
    sizes = sorted(arguments.images or ([200, 1000] if arguments.quick else [1000, 3000, 10_000, 30_000]))
    result = {"environment": environment(), "overhead": [overhead(name, rounds) for name in PIPES], "memory": memory(sizes)}
    print(tables(result), flush=True)
    if not arguments.quick:
        JSON.parent.mkdir(parents=True, exist_ok=True)
        JSON.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
