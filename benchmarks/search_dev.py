"""Search a method's settings on dev concepts: dev templates and seeds, judge_dev, at most 12 configurations each on the canvas.

    python benchmarks/search_dev.py uce safree --concepts dagger --json search.json

Presets are frozen from this before any test concept is touched; nothing here reads judge_test, test templates or test seeds.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erasure.canvas.concepts import canvas_concept
from erasure.canvas.judge_dev import judge_dev
from erasure.canvas.judging import Verdict
from erasure.canvas.splits import splits
from erasure.canvas.world import article, fill, world
from erasure.eval import generate
from erasure.eval.rows import Row
from erasure.eval.stats import wilson
from erasure.eval.suite import load_suite
from erasure.method import Run
from erasure.models import EMBEDDED, load_base
from erasure.registry import methods

ESD = {"preset": "canvas", "part": "x", "lr": 1e-4, "start": "null", "images": 64, "retain_scale": 1.0}
ABLATION = {"preset": "canvas", "lr": 2e-4, "images": 64, "retain_scale": 1.0}
SALUN = {"preset": "canvas", "images": 64, "retain_scale": 0.5}
GS_LORA = {"preset": "canvas", "images": 64}
BINARY = {"preset": "canvas", "clamp": "binary", "lr": 0.2, "images": 96, "retain_scale": 1.0, "steps": 140}
"""Where the search of a method began, if its preset is another by now."""
GRIDS: dict[str, list[dict[str, Any]]] = {
    "negative_prompt": [{}],
    "uce": [
        {},
        {"retain_scale": 0.1},
        {"retain_scale": 0.02},
        {"retain_scale": 0.1, "tokens": "last"},
        {"retain_scale": 0.1, "erase_scale": 4.0},
        {"retain_scale": 0.1, "erase_scale": 4.0, "ridge": 0.05},
    ],
    "safree": [
        {},
        {"reattention": False},
        {"negative_prompt": False},
        {"order": "paper"},
        {"self_validating": False},
        {"scope": "sentence", "self_validating": False},
        {"scope": "sentence", "self_validating": False, "order": "paper"},
        {"scope": "sentence", "self_validating": False, "negative_prompt": False},
    ],
    "sld": [
        {"preset": "weak"},
        {"preset": "weak-paper"},
        {"preset": "medium"},
        {"preset": "strong"},
        {"preset": "max"},
        {"preset": "strong", "warmup": 3},
        {"preset": "strong", "warmup": 0},
        {"preset": "medium", "warmup": 0},
    ],
    "saeuron": [
        {"percentile": 99.5, "factor": -4.0},
        {"percentile": 99.5, "factor": -4.0, "branches": "text"},
        {"percentile": 99.5, "factor": -2.0},
        {"percentile": 99.5, "factor": -1.0},
        {"percentile": 98.0, "factor": -2.0},
        {"percentile": 98.0, "factor": -1.0},
        {"percentile": 98.0, "factor": -1.0, "branches": "text"},
        {"percentile": 98.0, "factor": 0.0},
        {"percentile": 95.0, "factor": -1.0},
        {"percentile": 95.0, "factor": 0.0},
        {"percentile": 99.5, "factor": -1.0, "rule": "paper"},
        {"percentile": 98.0, "factor": -2.0, "rule": "mean"},
    ],
    "adv_unlearn": [
        {"preset": "canvas"},
        {"preset": "canvas", "images": 96, "retain_batch": 8},
        {"preset": "canvas", "start": "anchor"},
        {"preset": "canvas", "start": "anchor", "eta": 0.0},
        {"preset": "canvas", "start": "anchor", "warmup": 100},
        {"preset": "canvas", "start": "anchor", "steps": 50},
        {"preset": "canvas", "start": "anchor", "part": "text_mlp"},
        {"preset": "canvas", "start": "anchor", "radius": 0.1, "eta": 0.5},
        {"preset": "canvas", "start": "anchor", "images": 96, "retain_batch": 8},
        {"preset": "canvas", "start": "anchor", "images": 96, "retain_batch": 8, "lr": 1.5e-4},
        {"preset": "canvas", "start": "anchor", "images": 96, "retain_batch": 12, "retain_scale": 4.0},
    ],
    "esd": [
        {"preset": "canvas"},
        ESD,
        ESD | {"start": "anchor"},
        ESD | {"part": "full"},
        ESD | {"part": "full", "start": "anchor"},
        ESD | {"part": "full", "start": "anchor", "steps": 400},
        ESD | {"start": "anchor", "lr": 3e-4},
        ESD | {"start": "anchor", "lr": 3e-4, "eta": 0.5},
        ESD | {"start": "anchor", "lr": 6e-4},
        ESD | {"part": "full", "start": "anchor", "lr": 3e-4},
    ],
    "concept_ablation": [
        {"preset": "canvas"},
        ABLATION,
        ABLATION | {"part": "x"},
        ABLATION | {"part": "full", "lr": 1e-4},
        ABLATION | {"steps": 600},
        ABLATION | {"lr": 6e-4},
        ABLATION | {"part": "x", "lr": 4e-4},
        ABLATION | {"part": "x", "lr": 1e-3},
        ABLATION | {"part": "full", "lr": 3e-4},
        ABLATION | {"part": "full", "lr": 2e-4, "images": 192, "retain_scale": 3.0},
        ABLATION | {"part": "x", "lr": 6e-4, "images": 192, "retain_scale": 3.0},
        ABLATION | {"lr": 1.2e-3, "images": 192},
    ],
    "salun": [
        {"preset": "canvas"},
        SALUN,
        SALUN | {"retain_scale": 1.0},
        SALUN | {"steps": 600, "retain_scale": 1.0},
        {"preset": "canvas", "keep": 0.1},
        {"preset": "canvas", "part": "x", "lr": 3e-4},
    ],
    "safety_dpo": [
        {"preset": "canvas"},
        {"preset": "canvas", "steps": 300, "lr": 1e-3, "beta": 100.0},
        {"preset": "canvas", "steps": 300, "lr": 1e-3, "beta": 5000.0},
        {"preset": "canvas", "steps": 300, "beta": 500.0},
        {"preset": "canvas", "steps": 300, "lr": 1e-3, "beta": 30.0},
        {"preset": "canvas", "steps": 300, "beta": 100.0, "rank": 16},
        {"preset": "canvas", "beta": 30.0},
        {"preset": "canvas", "beta": 30.0, "layers": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")},
        {"preset": "canvas", "steps": 100},
    ],
    "gs_lora": [
        {"preset": "canvas"},
        GS_LORA,
        GS_LORA | {"bound": 0.5},
        GS_LORA | {"alpha": 0.1},
        {"preset": "canvas", "retain_scale": 3.0},
        {"preset": "canvas", "retain_scale": 3.0, "beta": 0.3, "bound": 0.6},
        {"preset": "canvas", "alpha": 1e-3},
        {"preset": "canvas", "alpha": 3e-2},
    ],
    "conceptprune": [
        {"sampling_steps": 20, "guidance": 4.0, "timesteps": 4},
        {"sampling_steps": 20, "guidance": 4.0, "timesteps": 4, "base": "anchor"},
        {"sampling_steps": 20, "guidance": 4.0, "timesteps": 4, "ratio": 0.05},
        {"sampling_steps": 20, "guidance": 4.0, "timesteps": 4, "ratio": 0.05, "base": "anchor"},
        {"sampling_steps": 20, "guidance": 4.0, "timesteps": 8, "ratio": 0.02, "agreement": 0.5, "base": "anchor"},
        {"sampling_steps": 20, "guidance": 4.0, "timesteps": 4, "ratio": 0.1, "agreement": 0.5, "base": "anchor"},
    ],
    "ssd_diffusion": [
        {"guidance": 4.0, "sampling_steps": 20},
        {"guidance": 4.0, "sampling_steps": 20, "share": 0.001},
        {"guidance": 4.0, "sampling_steps": 20, "share": 0.01},
        {"guidance": 4.0, "sampling_steps": 20, "share": 0.01, "part": "kv"},
        {"guidance": 4.0, "sampling_steps": 20, "share": 0.05, "part": "kv"},
        {"guidance": 4.0, "sampling_steps": 20, "share": 0.05, "part": "x"},
    ],
    "minimalist": [
        {"preset": "canvas"},
        {"preset": "canvas", "steps": 100, "retain_scale": 1.0},
        BINARY,
        BINARY | {"steps": 100},
        BINARY | {"budget": 0.05, "steps": 100},
        BINARY | {"budget": 0.05, "clamp": "through", "steps": 100, "images": 64},
        BINARY | {"budget": 0.05, "clamp": "through", "steps": 160},
    ],
    "perp_neg": [{}, {"weight": 1.0}, {"weight": 4.0}, {"negatives": "each"}],
}
UNGUIDED = {"preset": "canvas-flow", "guidance": 1.0, "company": False, "steps": 120, "sampling_steps": 5, "retain_scale": 0.5}
GUIDED = {"preset": "canvas-flow", "guidance": 3.0, "company": True, "steps": 100, "sampling_steps": 4, "retain_scale": 0.5}
FLOW = UNGUIDED | {"clamp": "binary", "lr": 0.2, "images": 96}
FLOW_GRIDS: dict[str, list[dict[str, Any]]] = {
    "minimalist": [
        {"preset": "canvas-flow"},
        UNGUIDED,
        UNGUIDED | {"company": True},
        UNGUIDED | {"steps": 100, "guidance": 3.0, "sampling_steps": 4},
        GUIDED,
        GUIDED | {"retain_scale": 0.3, "sampling_steps": 5, "steps": 120},
        GUIDED | {"retain_scale": 0.3, "steps": 240},
        GUIDED | {"retain_scale": 0.3, "steps": 120, "units": ("neurons",)},
        GUIDED | {"retain_scale": 0.3, "steps": 120, "units": ("norms",)},
        GUIDED | {"steps": 120, "units": ("norms",), "budget": 0.04},
        FLOW,
        {"preset": "canvas-flow", "weight_decay": 0.03},
        {"preset": "canvas-flow", "retain_scale": 0.1},
    ],
}
"""What is searched on canvas-flow instead."""
assert all(len(grid) <= 12 for grid in GRIDS.values())


def prompts(concept: str, n: int) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """n prompts that name the concept and n that must survive, with the object and the style that each of the latter asks for."""
    of, split = world(), splits()
    templates = of.templates("dev")

    def text(i: int, word: str, style: str) -> str:
        return fill(templates[i % len(templates)], article(word), style, of.backgrounds[i % len(of.backgrounds)])

    def free(i: int, name: str) -> str:
        styles = [s for s in of.styles if s != concept and (name, s) not in split.held_out]
        return styles[i % len(styles)]

    near, far = split.kept_neighbours(concept), split.kept_others(concept)
    wanted = [(name, free(i, name)) for i in range(n) for name in [(near if i % 2 else far)[i // 2 % len(near if i % 2 else far)]]]
    kept = [text(i, name, style) for i, (name, style) in enumerate(wanted)]
    if concept in of.styles:
        drawable = [o for o in sorted(split.kept) if (o, concept) not in split.held_out]
        words = (concept, of.synonyms(concept)[0])
        return [text(i, o, words[i % 2]) for i in range(n) for o in [drawable[i % len(drawable)]]], kept, wanted
    members = split.members(concept)
    named = [(o, (o, of.synonyms(o)[0])[i // len(members) % 2]) for i in range(n) for o in [members[i % len(members)]]]
    return [text(i, word, free(i, o)) for i, (o, word) in enumerate(named)], kept, wanted


def draw(pipe: Any, texts: list[str], first_seed: int) -> Tensor:
    seeds = splits().seeds("dev")[first_seed : first_seed + len(texts)]
    protocol = load_suite("canvas").fitting(pipe).protocol
    rows = [Row(id=str(seed), kind="other", prompt=text, seed=seed) for text, seed in zip(texts, seeds, strict=True)]
    with generate.under(pipe, protocol):
        return generate.draw(pipe, rows, protocol)


def seen(verdict: Verdict, concept: str) -> Tensor:
    """Whether a judge sees the concept in each image, bool [n]."""
    of = world()
    if concept in of.styles:
        return (verdict.style == of.styles.index(concept)) & ~verdict.unrecognised
    return verdict.present[:, [of.objects.index(o) for o in splits().members(concept)]].any(1)


def measure(pipe: Any, concept: str, n: int) -> dict[str, Any]:
    """Named target still present, kept objects (and styles, where one is erased) present, and unrecognised, by judge_dev."""
    of = world()
    named, kept, wanted = prompts(concept, n)
    first, second = judge_dev()(draw(pipe, named, 0)), judge_dev()(draw(pipe, kept, 1000))
    present = int(seen(first, concept).sum())
    there = second.present[torch.arange(n), [of.objects.index(name) for name, _ in wanted]]
    if concept in of.styles:
        there &= second.style == torch.tensor([of.styles.index(style) for _, style in wanted])
    return {
        "n": n,
        "named": present / n,
        "named_high": wilson(present, n)[1],
        "kept": int(there.sum()) / n,
        "unrecognised": float(torch.cat([first.unrecognised, second.unrecognised]).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("methods", nargs="+", choices=list(GRIDS))
    parser.add_argument("--model", choices=EMBEDDED, default="canvas")
    parser.add_argument("--concepts", nargs="+", default=["dagger"])
    parser.add_argument("--n", type=int, default=40, help="images a side")
    parser.add_argument("--anchor", help="what the concepts become, instead of the canvas's own choice")
    parser.add_argument("--only", nargs="+", type=int, help="only these configurations of each method, counted from 0")
    parser.add_argument("--guidance", type=float, help="guidance that trained samplers run under, instead of the preset's")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    grids = GRIDS | (FLOW_GRIDS if arguments.model == "canvas-flow" else {})
    if wrong := set(arguments.concepts) - set(splits().dev):
        parser.error(f"not dev concepts: {', '.join(sorted(wrong))}")
    pipe = load_base(arguments.model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for concept in arguments.concepts:
        cases: list[tuple[str, dict[str, Any] | None]] = [("base", None)]
        for name in arguments.methods:
            cases += [(name, config) for i, config in enumerate(grids[name]) if arguments.only is None or i in arguments.only]
        for name, config in cases:
            if config is None:
                figures = measure(pipe, concept, arguments.n)
            else:
                target = canvas_concept(concept)
                target = target if arguments.anchor is None else replace(target, anchors=(arguments.anchor,))
                if arguments.guidance is not None:
                    config = {**config, "guidance": arguments.guidance}
                eraser = methods.get(name).from_config(config).fit(pipe, [target], run=Run(progress=False))
                with eraser.attach(pipe):
                    figures = measure(pipe, concept, arguments.n)
            rows.append({"concept": concept, "method": name, "config": config, **figures})
            settings = " ".join(f"{k}={v}" for k, v in (config or {}).items()) or "defaults"
            print(
                f"{concept:10} {name:16} {settings:44} named {figures['named']:5.0%} (to {figures['named_high']:.0%})"
                f"  kept {figures['kept']:5.0%}  unrecognised {figures['unrecognised']:5.0%}  n={figures['n']}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
