"""What an attached eraser costs a run: encoding, steps with the filter on and off, decoding, timed apart and beside the base.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --quick --models canvas

Every round runs each case for a few steps, right after the base, in an order that turns by one each round. A case's part is the base's
median times the median of its ratios to the base just before it, so that drift of the machine cancels. The total of 50 steps is composed:
encode + k filter-on steps + (50 - k) filter-off steps + decode. Intervals are 95 % bootstraps over rounds; a base in the place of a case
shows the noise. On a machine that others use, ``--clock cpu`` (with OMP_NUM_THREADS=1) leaves out the time that they take.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from erasure.concept import Concept
from erasure.models import load_base
from erasure.registry import methods
from erasure.seams.instance import overridden

JSON = Path(__file__).parent.parent / "docs" / "benchmarks" / "overhead.json"
PROMPT = "a painting of a dagger with a cat on a boat in the night sky"
CONCEPT = Concept("dagger", targets=("dagger", "knife"), anchors=("cat",))
PARTS = ("encode", "on", "off", "decode")
TOTAL = 50
"""Steps of the composed run."""
FILTERED = 10
"""Steps of it with SAFREE's filter on: t'/T = .2."""
ON, OFF = {"self_validating": False, "alpha": -1.0}, {"alpha": 1e9}
"""SAFREE with every token a trigger at every step, and with none at any: what a step costs while the filter is on, and after."""


@dataclass(frozen=True)
class Case:
    """A row of the table: a method with its filter on and, where that differs, off."""

    name: str
    method: str = ""
    on: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] | None = None
    """Settings for steps after the filter; None where every step costs the same."""
    bar: float | None = None
    """Most that the composed run may cost, relative to the base."""


CASES = (
    Case("base"),
    Case("negative_prompt", "negative_prompt", bar=1.0),
    Case("uce", "uce", bar=1.0),
    Case("safree, no re-attention", "safree", {"reattention": False, **ON}, {"reattention": False, **OFF}, bar=1.05),
    Case("safree", "safree", {"reattention": True, **ON}, {"reattention": True, **OFF}, bar=1.15),
    Case("sld", "sld", {"warmup": 0}, bar=1.55),
    Case("perp_neg", "perp_neg"),
)


def sd15(dtype: torch.dtype) -> Any:
    """Stable Diffusion 1.5 by its sizes, with random weights: what it draws is noise, what it costs is not."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from erasure.testing.tiny import tokenizer

    words = tokenizer()
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=words,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval(),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe.to(dtype)


def canvas(dtype: torch.dtype) -> Any:
    return load_base("canvas", device="cpu", dtype=dtype)


Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
MODELS: dict[str, Callable[[torch.dtype], Any]] = {"canvas": canvas, "sd15": sd15}


@contextmanager
def stopwatch(pipe: Any, clock: Clock, marks: dict[str, list[float]]) -> Iterator[None]:
    """Note when encoding begins and ends and when the loop begins; opened after an eraser, so that its part is inside."""

    def timed(before: str, after: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                marks[before].append(clock())
                result = inner(*args, **kwargs)
                marks[after].append(clock())
                return result

            return run

        return wrap

    with (
        overridden(pipe, "encode_prompt", timed("encode", "encoded")),
        overridden(pipe, "progress_bar", timed("loop", "started")),
    ):
        yield


def timings(pipe: Any, eraser: Any, clock: Clock, steps: int, options: dict[str, Any]) -> dict[str, float]:
    """Seconds of encoding, a step (the median), and decoding in one short run."""
    marks: dict[str, list[float]] = {name: [] for name in ("encode", "encoded", "loop", "started", "step")}

    def stepped(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        marks["step"].append(clock())
        return values

    with eraser.attach(pipe) if eraser is not None else nullcontext(), stopwatch(pipe, clock, marks):
        pipe(PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), callback_on_step_end=stepped, **options)
        end = clock()
    ends = [marks["started"][0], *marks["step"]]
    return {
        "encode": marks["encoded"][0] - marks["encode"][0],
        "step": statistics.median(b - a for a, b in pairwise(ends)),
        "decode": end - ends[-1],
    }


Parts = dict[str, float]
"""Seconds of each part: encode, on, off, decode."""
Round = dict[str, tuple[Parts, Parts]]
"""By case: the base just before it, and the case."""


def fitted(pipe: Any) -> dict[str, tuple[Any, Any]]:
    """The erasers of each case: with the filter on, and off where that differs."""

    def fit(case: Case, config: dict[str, Any] | None) -> Any:
        return None if config is None or not case.method else methods.get(case.method).from_config(config).fit(pipe, [CONCEPT])

    return {case.name: (fit(case, case.on), fit(case, case.off)) for case in CASES}


def measure(pipe: Any, rounds: int, clock: Clock, steps: int, options: dict[str, Any]) -> list[Round]:
    """The parts of every case in every round; one more round comes first, to warm up, and is dropped."""
    erasers, found = fitted(pipe), []

    def run(on: Any, off: Any) -> Parts:
        first = timings(pipe, on, clock, steps, options)
        after = first if off is None else timings(pipe, off, clock, steps, options)
        return {"encode": first["encode"], "on": first["step"], "off": after["step"], "decode": first["decode"]}

    for turn in range(rounds + 1):
        start = turn % len(CASES)
        found.append({case.name: (run(None, None), run(*erasers[case.name])) for case in (*CASES[start:], *CASES[:start])})
    return found[1:]


def base_parts(rounds: list[Round]) -> Parts:
    """Medians over all runs of the base."""
    return {part: statistics.median(base[part] for r in rounds for base, _ in r.values()) for part in PARTS}


def parts_of(name: str, rounds: list[Round]) -> Parts:
    """Of a case: the base's medians times the medians of the case's ratios to the base just before it."""
    return {
        part: seconds * statistics.median(mine[part] / base[part] for base, mine in (r[name] for r in rounds))
        for part, seconds in base_parts(rounds).items()
    }


def total(parts: Parts, filtered: int) -> float:
    return parts["encode"] + filtered * parts["on"] + (TOTAL - filtered) * parts["off"] + parts["decode"]


def ratio(case: Case, rounds: list[Round]) -> float:
    """What the composed run costs, relative to the base's."""
    filtered = FILTERED if case.off is not None else TOTAL
    return total(parts_of(case.name, rounds), filtered) / total(base_parts(rounds), filtered)


def interval(case: Case, rounds: list[Round], draws: int = 1000) -> tuple[float, float]:
    """95 % bootstrap over rounds of `ratio`."""
    dice = random.Random(0)
    drawn = sorted(ratio(case, dice.choices(rounds, k=len(rounds))) for _ in range(draws))
    return drawn[round(0.025 * (draws - 1))], drawn[round(0.975 * (draws - 1))]


def verdict(value: float, low: float, bar: float | None, noise: float) -> str:
    """Whether a ratio keeps its bar; a miss is one that a base in the place of a case (``noise``: its upper limit) would not reach."""
    if bar is None:
        return ""
    return "yes" if round(value, 2) <= bar else "within noise" if low <= bar * max(noise, 1) else "no"


def rows(rounds: list[Round]) -> list[dict[str, Any]]:
    found = []
    _, noise = interval(CASES[0], rounds)
    for case in CASES:
        value, (low, high) = ratio(case, rounds), interval(case, rounds)
        milliseconds = {part: round(1000 * seconds, 3) for part, seconds in parts_of(case.name, rounds).items()}
        numbers = {"ratio": round(value, 4), "low": round(low, 4), "high": round(high, 4)}
        config = {"on": case.on, "off": case.off} if case.method else {}
        found.append(
            {"case": case.name, **config, "ms": milliseconds, **numbers, "bar": case.bar, "met": verdict(value, low, case.bar, noise)}
        )
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown: parts in milliseconds, and the composed run relative to the base."""
    lines = [
        f"{result['model']}: {result['size']} px, {result['dtype']}, milliseconds by {result['clock']} clock, "
        f"n = {result['rounds']} rounds of {result['steps']} step(s), "
        f"{result['environment']['threads']} thread(s), {result['environment']['cpu']}",
        "",
        f"| case | encode | filter-on step | filter-off step | decode | {TOTAL} steps | 95 % | bar | met |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in result["rows"]:
        ms, bar = row["ms"], "" if row["bar"] is None else f"{row['bar']:.2f}"
        times = " | ".join(f"{ms[part]:,.1f}" for part in PARTS)
        lines.append(f"| {row['case']} | {times} | {row['ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f} | {bar} | {row['met']} |")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    names = Path("/proc/cpuinfo").read_text().split("model name") if Path("/proc/cpuinfo").exists() else []
    cpu = names[1].split("\n")[0].strip("\t :") if len(names) > 1 else platform.processor() or platform.machine()
    return {"cpu": cpu, "threads": torch.get_num_threads(), **{name: version(name) for name in ("torch", "diffusers", "transformers")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, help="rounds a model (canvas: 30, sd15: 5)")
    parser.add_argument("--steps", type=int, help="steps of each timed run (canvas: 4, sd15: 1)")
    parser.add_argument("--size", type=int, default=256, help="pixels a side of the sd15 images; the canvas has its own")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="what is timed: time that passes, or time of this process")
    parser.add_argument("--quick", action="store_true", help="5 and 2 rounds; writes no file unless --json says so")
    parser.add_argument("--json", type=Path, help=f"where the figures go (default: {JSON.relative_to(JSON.parent.parent.parent)})")
    arguments = parser.parse_args()
    usual = {"canvas": (5, 4), "sd15": (2, 1)} if arguments.quick else {"canvas": (30, 4), "sd15": (5, 1)}
    results = []
    for model in arguments.models:
        rounds, steps = (given or default for given, default in zip((arguments.rounds, arguments.steps), usual[model], strict=True))
        pipe = MODELS[model](getattr(torch, arguments.dtype))
        pipe.set_progress_bar_config(disable=True)
        options = {"guidance_scale": 7.5} | ({"height": arguments.size, "width": arguments.size} if model == "sd15" else {})
        size = arguments.size if model == "sd15" else pipe.unet.config.sample_size * pipe.vae_scale_factor
        measured = measure(pipe, rounds, CLOCKS[arguments.clock], steps, options)
        head = {"model": model, "size": size, "dtype": arguments.dtype, "clock": arguments.clock, "rounds": rounds, "steps": steps}
        results.append({**head, "environment": environment(), "total_steps": TOTAL, "filtered_steps": FILTERED, "rows": rows(measured)})
        print(f"\n{table(results[-1])}", flush=True)
    if target := arguments.json or (None if arguments.quick else JSON):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
