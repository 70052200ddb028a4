"""Print every bar of the canvas and its judges, with n and 95 % Wilson intervals, and draw the contact sheet.

    python scripts/check_canvas.py                      # the model: objects, styles, backgrounds, pairs, synonyms, speed, size
    python scripts/check_canvas.py --icons canvas-build/icons   # and the judges, on renders (made by scripts/train_canvas.py)
    python scripts/check_canvas.py --model canvas-flow          # the flow-matching model, without guidance

Prompts use templates and seeds that no training has seen.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from canvas_training.art import Painter
from canvas_training.judges import Data, round_trip
from canvas_training.scenes import sample
from canvas_training.vae import paint
from erasure.canvas.judge_dev import judge_dev
from erasure.canvas.judge_test import judge_test
from erasure.canvas.judging import Verdict
from erasure.canvas.splits import splits, training_drawings
from erasure.canvas.world import fill, world
from erasure.eval.stats import wilson
from erasure.families import call_options
from erasure.models import load_base

STEPS = 20
GUIDANCE = {"canvas": {"guidance_scale": 4.0}, "canvas-flow": {}}
BARS = {
    "canvas": {"object": 0.90, "style": 0.95, "background": 0.95, "pair": 0.60, "synonym": 0.70, "seconds": 60},
    "canvas-flow": {"object": 0.80, "style": 0.90, "seconds": 90},
}
"""What each model has to reach: shares, and seconds for 64 images of 20 steps."""
MOST_MB = 70
WEIGHTS = Path(__file__).parents[1] / "erasure/canvas/weights"


class Report:
    """Lines with their bars; remembered for the JSON file."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def rate(self, name: str, hits: Tensor, bar: float | None = None) -> None:
        k, n = int(hits.sum()), len(hits)
        low, high = wilson(k, n)
        met = None if bar is None else k / n >= bar
        self.rows.append({"name": name, "k": k, "n": n, "rate": k / n, "low": low, "high": high, "bar": bar, "met": met})
        print(f"{name:<46} {k / n:6.1%}  [{low:.1%}, {high:.1%}]  n={n}{_verdict(bar, met, lambda b: f'{b:.0%}')}", flush=True)

    def number(self, name: str, value: float, unit: str, at_most: float | None = None) -> None:
        met = None if at_most is None else value <= at_most
        self.rows.append({"name": name, "value": value, "unit": unit, "at_most": at_most, "met": met})
        print(f"{name:<46} {value:6.2f} {unit}{_verdict(at_most, met, lambda b: f'at most {b:g} {unit}')}", flush=True)


def _verdict(bar: float | None, met: bool | None, text: object) -> str:
    return "" if bar is None else f"  bar {text(bar)}: {'met' if met else 'MISSED'}"  # type: ignore[operator]


class Prompts:
    """Rows (objects, style, background, prompt) from templates that the canvas has not seen."""

    def __init__(self) -> None:
        self.rows: list[tuple[tuple[str, ...], str, str, str]] = []

    def add(self, objects: tuple[str, ...], style: str, background: str, words: tuple[str, ...] | None = None) -> None:
        of, k = world(), len(self.rows)
        template = of.templates("test")[k % len(of.templates("test"))]
        noun = of.noun(*(words or objects), pair=of.pair_templates("test")[0])
        self.rows.append((objects, style, background, fill(template, noun, style, background)))

    def images(self, pipe: object, guidance: dict[str, Any], batch: int = 64) -> Tensor:
        seeds = splits().seeds("test")
        out = []
        for start in range(0, len(self.rows), batch):
            part = self.rows[start : start + batch]
            generators = [torch.Generator().manual_seed(seeds[50_000 + start + i]) for i in range(len(part))]
            size = {"height": 64, "width": 64, **call_options(pipe)}
            made = pipe([r[3] for r in part], num_inference_steps=STEPS, generator=generators, output_type="pt", **size, **guidance)  # type: ignore[operator]
            out.append(made.images)
        return torch.cat(out)

    def present(self, verdict: Verdict) -> Tensor:
        """bool [n]: every wanted object is there."""
        index = [[world().objects.index(o) for o in row[0]] for row in self.rows]
        return torch.stack([verdict.present[i, ids].all() for i, ids in enumerate(index)])


def scenes(kind: str, n: int) -> Prompts:
    """n prompts of a kind: single, pair, synonym (fit-side), or unseen (drawings that were held out)."""
    of, generator, prompts = world(), torch.Generator().manual_seed(11), Prompts()
    unseen = sorted(splits().held_out)
    drawn = sample(n, training_drawings(of), generator, pair_share=1.0 if kind == "pair" else 0.0)
    for i in range(n):
        first, second = drawn.objects[i].tolist()
        style, background = of.styles[drawn.styles[i]], of.backgrounds[drawn.backgrounds[i]]
        if kind == "unseen":
            name, style = unseen[i % len(unseen)]
            prompts.add((name,), style, background)
        elif kind == "pair":
            prompts.add((of.objects[first], of.objects[second]), style, background)
        else:
            name = of.objects[first]
            prompts.add((name,), style, background, (of.synonyms(name)[0],) if kind == "synonym" else None)
    return prompts


def check_model(report: Report, model: str, sheet: Path | None) -> None:
    bars, guidance = BARS[model], GUIDANCE[model]
    started = time.perf_counter()
    pipe = load_base(model, device="cpu")
    report.number("loading", time.perf_counter() - started, "s", at_most=3)
    pipe.set_progress_bar_config(disable=True)
    single = scenes("single", 304)
    started = time.perf_counter()
    first = Prompts()
    first.rows = single.rows[:64]
    first.images(pipe, guidance)
    report.number("64 images, 20 steps", time.perf_counter() - started, "s", at_most=bars["seconds"])
    report.number("all packaged weights", sum(p.stat().st_size for p in WEIGHTS.rglob("*") if p.is_file()) / 1e6, "MB", at_most=MOST_MB)
    images = single.images(pipe, guidance)
    test, dev = judge_test()(images), judge_dev()(images)
    report.rate("object present", single.present(test), bars["object"])
    report.rate("style", torch.tensor([world().styles[s] == r[1] for s, r in zip(test.style, single.rows, strict=True)]), bars["style"])
    seen = [world().backgrounds[b] == r[2] for b, r in zip(test.background, single.rows, strict=True)]
    report.rate("background", torch.tensor(seen), bars.get("background"))
    report.rate("unrecognised", test.unrecognised)
    for name, kind, n in (("both of a pair", "pair", 160), ("unseen object x style", "unseen", 120), ("fit-side synonyms", "synonym", 192)):
        prompts = scenes(kind, n)
        report.rate(name, prompts.present(judge_test()(prompts.images(pipe, guidance))), bars.get(kind))
    report.rate("judges agree on the wanted object", single.present(test) == single.present(dev))
    for verdict, name in ((dev, "judge_dev"), (test, "judge_test")):
        report.rate(f"{name}: absent objects called present", false_calls(single, verdict))
    if sheet is not None:
        contact_sheet(single, images, dev, test, sheet)


def false_calls(prompts: Prompts, verdict: Verdict) -> Tensor:
    """bool [n x (objects - wanted)]: calls on objects that the prompt does not name, the judge's floor on generated images."""
    wanted = torch.zeros_like(verdict.present)
    for i, row in enumerate(prompts.rows):
        wanted[i, [world().objects.index(o) for o in row[0]]] = True
    return verdict.present[~wanted]


def contact_sheet(prompts: Prompts, images: Tensor, dev: Verdict, test: Verdict, path: Path, columns: int = 20) -> None:
    """300 generated images, each with what was asked and whether judge_dev and judge_test see it."""
    n, cell_w, cell_h = 300, 68, 84
    sheet = Image.new("RGB", (columns * cell_w, -(-n // columns) * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(n):
        x, y = i % columns * cell_w, i // columns * cell_h
        sheet.paste(to_pil_image(images[i].clamp(0, 1)), (x + 2, y + 2))
        wanted = world().objects.index(prompts.rows[i][0][0])
        calls = "".join("+" if v.present[i, wanted] else "?" if v.unrecognised[i] else "-" for v in (dev, test))
        draw.text((x + 2, y + 67), f"{calls} {prompts.rows[i][0][0]}"[:13], fill="black" if calls == "++" else "red", font_size=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    print(f"contact sheet: {path} (asked object, + seen, - not seen, ? unrecognised; judge_dev then judge_test)")


def check_judges(report: Report, icons: Path) -> None:
    """The judges on renders of drawings that they know, in positions that they have not seen, and on art that no model saw."""
    of, vae = world(), load_base("canvas", device="cpu").vae
    painter = Painter(icons, of)
    data = Data(painter, vae, 3000, 999, of, trips=0.0)
    blurred = Data(painter, vae, 1500, 998, of, trips=1.0)
    present = data.presence.bool()
    for judge in (judge_dev(), judge_test()):
        verdict = judge(data.images.float() / 255)
        report.rate(f"{judge.name}: presence recall on renders", verdict.present[present], 0.97)
        report.rate(f"{judge.name}: false positives on renders", verdict.present[~present])
        report.rate(f"{judge.name}: style", verdict.style == data.scenes.styles, 0.99)
        report.rate(f"{judge.name}: background", verdict.background == data.scenes.backgrounds, 0.99)
        seen = judge(blurred.images.float() / 255).present
        report.rate(f"{judge.name}: recall, noisy autoencoder round trips", seen[blurred.presence.bool()])
        report.rate(f"{judge.name}: false positives on those", seen[~blurred.presence.bool()])
        report.rate(f"{judge.name}: junk called unrecognised", judge(data.junk.float() / 255).unrecognised)
        unseen = Painter(icons, of, ("noto-v1",))
        there = (unseen.single[:, 0, 3].sum((1, 2)) > 0)[:, None]
        drawn = sample(1000, there, torch.Generator().manual_seed(5), pair_share=0.0)
        foreign = judge(round_trip(vae, paint(unseen, drawn), 0.0, torch.Generator().manual_seed(6)) / 2 + 0.5)
        hits = foreign.present[torch.arange(1000), drawn.objects[:, 0]]
        report.rate(f"{judge.name}: presence recall, unseen art (noto-v1)", hits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=BARS, default="canvas")
    parser.add_argument("--icons", type=Path, help="icon folder of a canvas build; with it the judges are checked on renders")
    parser.add_argument("--sheet", type=Path, help="where to draw the contact sheet (png)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    report = Report()
    if arguments.icons:
        check_judges(report, arguments.icons)
    check_model(report, arguments.model, arguments.sheet)
    if arguments.json:
        arguments.json.write_text(json.dumps(report.rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
