"""The controls' images, made by the harness's own store, and all that it says of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from meta_evaluation_orderings import BASE, CONTROLS, DESTROYER, REFUSER, RESEEDED, RETRAINED
from torch import Tensor, nn
from tqdm.auto import tqdm

from erasure import fingerprint
from erasure.canvas.concepts import canvas_concept
from erasure.canvas.judge_test import judge_test
from erasure.canvas.splits import splits
from erasure.canvas.world import article, fill, world
from erasure.concept import Concept
from erasure.eval.generate import draw, under
from erasure.eval.metrics.base import Panel, SampleMetric
from erasure.eval.metrics.canvas_alignment import CanvasAlignment
from erasure.eval.metrics.distances import CMMD, FID, KID
from erasure.eval.metrics.extraction import extractor
from erasure.eval.metrics.features import extract
from erasure.eval.metrics.perceptual import STLPIPS
from erasure.eval.protocol import digest
from erasure.eval.rows import ASKED, Row
from erasure.eval.score import Sample, score
from erasure.eval.scoring import Scorers, scan
from erasure.eval.store import Cell, Settings
from erasure.eval.subjects import subject
from erasure.eval.suite import Suite

BATCH = 16
OTHER_SEEDS = 1_000_000
"""Added to a row's seed: outside every range of the splits."""
Rows = dict[str, list[Row]]
"""Concept -> rows."""
Maker = Callable[[Sequence[Row]], Tensor]


@dataclass(frozen=True)
class Plan:
    """The rows of all test concepts: those that ask for the concept, and those that must survive it."""

    suite: Suite
    asked: Rows
    kept: Rows

    @classmethod
    def of(cls, suite: Suite) -> "Plan":
        """Kept rows that ask for another test concept are left out: the retrained control never saw those either."""
        asked, kept = {}, {}
        for concept in splits().test:
            slug = concept.replace(" ", "-")
            rows = [replace(row, id=f"{slug}-{row.id}") for row in suite.rows(canvas_concept(concept))]
            asked[concept] = [row for row in rows if ASKED[row.kind] == "erased"]
            kept[concept] = [row for row in rows if ASKED[row.kind] == "kept" and learned(row)]
        return cls(suite, asked, kept)


def learned(row: Row, of: str | None = None) -> bool:
    """Whether the retrained control saw all that a row asks for, but for the concept ``of`` itself."""
    unseen = {name for concept in splits().test if concept != of for name in (concept, *subject(concept).members)}
    own = set(subject(of).members) if of else set()
    return not ({*row.objects} - own) & unseen and row.style not in unseen


@dataclass
class Seen:
    """What the harness says of one control's images."""

    samples: dict[str, list[Sample]]
    """Concept -> samples of the asked rows, then of the kept ones."""
    means: dict[str, np.ndarray]
    """Metric -> values of the kept rows."""
    sets: dict[str, float]
    """Metric -> distance of the kept rows' images to the base's, as the harness prints it."""
    judged: np.ndarray
    """The judge's features of the kept rows, then of the asked ones."""
    drift: np.ndarray
    """EfficientNet's features of the kept rows."""


def make(plan: Plan, base: Any, control: Any, folder: Path) -> dict[str, dict[str, Cell]]:
    """Control -> side ("kept", "asked") -> complete cell; what an earlier run made stays."""
    protocol, rows = plan.suite.protocol, {"kept": flat(plan.kept), "asked": flat(plan.asked)}
    models = {name: digest(fingerprint.take(pipe)) for name, pipe in ((BASE, base), (RETRAINED, control))}
    cells: dict[str, dict[str, Cell]] = {}
    with under(base, protocol), under(control, protocol):
        anchors = _anchors(plan, base)
        makers: dict[str, Maker] = {
            BASE: lambda part: draw(base, part, protocol),
            RESEEDED: lambda part: draw(base, [replace(row, seed=row.seed + OTHER_SEEDS) for row in part], protocol),
            RETRAINED: lambda part: draw(control, part, protocol),
            DESTROYER: lambda part: torch.stack([_destroyed(row, protocol.height, protocol.width) for row in part]),
            REFUSER: lambda part: torch.stack([anchors[row.id] for row in part]),
        }
        for name in CONTROLS:
            model = models.get(name, models[BASE])
            cells[name] = {}
            for side, of in rows.items():
                settings = Settings.of(of, protocol, eraser=name, model=model, batch_size=BATCH)
                cells[name][side] = Cell.open(folder / name.replace(" ", "-") / side, of, settings)
                _fill(cells[name][side], makers[name], f"{name}, {side}")
    return cells


def flat(rows: Rows) -> list[Row]:
    return [row for of in rows.values() for row in of]


def _fill(cell: Cell, maker: Maker, label: str) -> None:
    for chunk in tqdm(cell.missing(), desc=label, unit="chunk", leave=False):
        started = time.perf_counter()
        images = maker(chunk.rows)
        cell.write(chunk, images, time.perf_counter() - started)


def _anchors(plan: Plan, base: Any) -> dict[str, Tensor]:
    """Row -> the one image that the refuser has for the row's concept: the base's, of the concept's anchor."""
    of, split, found = world(), splits(), dict[str, Tensor]()
    for concept in split.test:
        anchor = canvas_concept(concept).anchors[0]
        style = anchor if anchor in of.styles else None
        noun = article(split.retained(concept)[0] if style else anchor)
        prompt = fill(of.templates("test")[0], noun, style, None)
        image = draw(base, [Row("anchor", "other", prompt, split.seeds("test")[0])], plan.suite.protocol)[0]
        found |= {row.id: image for row in (*plan.asked[concept], *plan.kept[concept])}
    return found


def _destroyed(row: Row, height: int, width: int) -> Tensor:
    """Noise for even seeds, one flat colour for odd ones."""
    generator = torch.Generator().manual_seed(row.seed)
    shape = (3, 1, 1) if row.seed % 2 else (3, height, width)
    return (0.05 + 0.95 * torch.rand(shape, generator=generator)).expand(3, height, width)  # black would count as refused


class JudgeFeatures(nn.Module):
    """Features [n, 192] of canvas images in 0..1: the trunk of judge_test, its four quarters averaged."""

    num_features = 192

    def __init__(self) -> None:
        super().__init__()
        self.trunk = judge_test().net.trunk

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images * 2 - 1).unflatten(1, (self.num_features, 4)).mean(2)


def look(plan: Plan, cells: dict[str, dict[str, Cell]]) -> dict[str, Seen]:
    """Every control's images through the harness's judge and metrics, beside the base's of the same rows."""
    features = extractor(JudgeFeatures())
    return {name: _look(plan, own, cells[BASE], features) for name, own in tqdm(cells.items(), desc="score", unit="control", leave=False)}


def _look(plan: Plan, own: dict[str, Cell], base: dict[str, Cell], features: Any) -> Seen:
    nobody = Concept("all test concepts")  # the panel asks no judge about a target
    table = KID(features=features, subset_size=None)
    scan(own["asked"], Scorers(nobody, panel=Panel([table])), base["asked"], progress=False)
    asked = table.table()
    kid = KID(features=features, subset_size=None)
    panel = Panel([kid, FID(features=features), CMMD(features=features), CanvasAlignment(), STLPIPS()])
    found = scan(own["kept"], Scorers(nobody, features=extract, panel=panel), base["kept"], progress=False)
    assert found.features is not None
    values, rows = panel.samples(), flat(plan.kept)
    heads = [name for name, metric in panel.metrics.items() if isinstance(metric, SampleMetric)]
    return Seen(
        samples={concept: _judged(own, plan, concept) for concept in plan.asked},
        means={name: np.array([values[row.id][f"{name}.{name}"] for row in rows], dtype=np.float64) for name in heads},
        sets={name: metric.result()["value"] for name, metric in panel.metrics.items() if name not in heads},
        judged=np.concatenate([kid.table().numpy(), asked.numpy()]).astype(np.float64),
        drift=found.features.numpy().astype(np.float64),
    )


def _judged(cells: dict[str, Cell], plan: Plan, concept: str) -> list[Sample]:
    found = []
    for side, rows in (("asked", plan.asked[concept]), ("kept", plan.kept[concept])):
        found += score(cells[side].images(rows), rows, judge_test(), canvas_concept(concept))
    return found
