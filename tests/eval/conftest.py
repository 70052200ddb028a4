"""Stand-ins for what evaluation meets: judges with fixed calls, a pipeline that draws noise from its generators."""

import random
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from erasure.canvas.judging import Verdict
from erasure.canvas.world import world
from erasure.concept import Concept
from erasure.eval import protocol, suite
from erasure.eval.compare import Entry
from erasure.eval.rows import Kind, Row
from erasure.eval.score import Sample, score
from erasure.eval.store import rows_hash
from erasure.eval.summary import Cost, summarise


@pytest.fixture(autouse=True, scope="module")
def weights_of_judges() -> Iterator[None]:
    """A fixed hash, so that tests of rows and rates do not move when the judges are trained again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "judge_sha256", lambda name: "0" * 64)
        yield


@pytest.fixture(scope="module")
def demo() -> suite.Suite:
    return suite.load_suite("canvas-demo")


@pytest.fixture(scope="module")
def make_rows() -> Callable[..., list[Row]]:
    """n rows of a kind that ask for given objects."""

    def make(
        n: int, kind: Kind = "named", objects: tuple[str, ...] = ("dagger",), style: str | None = None, background: str | None = None
    ) -> list[Row]:
        return [Row(f"{kind}-{i:03d}", kind, f"{kind} prompt {i}", 1000 + i, objects, style, background) for i in range(n)]

    return make


@pytest.fixture(scope="module")
def make_verdict() -> Callable[..., Verdict]:
    """A verdict from one tuple of objects an image, or None for an unrecognised one; styles and backgrounds by name."""

    def make(
        seen: Sequence[Sequence[str] | None], styles: Sequence[str] | None = None, backgrounds: Sequence[str] | None = None
    ) -> Verdict:
        of, n = world(), len(seen)
        present = torch.zeros(n, len(of.objects), dtype=torch.bool)
        for i, objects in enumerate(seen):
            for o in objects or ():
                present[i, of.objects.index(o)] = True
        style = torch.tensor([of.styles.index(s) for s in styles or [of.styles[0]] * n])
        background = torch.tensor([of.backgrounds.index(b) for b in backgrounds or [of.backgrounds[0]] * n])
        return Verdict(present.float() * 0.9, present, style, background, torch.tensor([s is None for s in seen]))

    return make


@pytest.fixture(scope="module")
def make_samples(make_verdict: Callable[..., Verdict]) -> Callable[..., list[Sample]]:
    """Samples of rows from a function that says, for each row, what the judge sees in it."""

    def make(rows: Sequence[Row], seen: Callable[[Row], Sequence[str] | None], concept: str = "dagger") -> list[Sample]:
        verdict = make_verdict([seen(row) for row in rows], [r.style or "flat" for r in rows], [r.background or "white" for r in rows])
        return score(torch.zeros(len(rows), 3, 64, 64), rows, lambda images: verdict, Concept(concept))

    return make


@pytest.fixture(scope="module")
def make_entry(make_samples: Callable[..., list[Sample]]) -> Callable[..., Entry]:
    """Results and samples of a made-up method: the share of dagger prompts that still show one, and of kept ones that stay."""

    def make(
        of: suite.Suite, name: str, target: float, kept: float, base: Sequence[Sample] | None = None, unrecognised: float = 0.0
    ) -> Entry:
        rng = random.Random(name)
        rows = of.rows(Concept("dagger"))

        def seen(row: Row) -> tuple[str, ...] | None:
            if rng.random() < unrecognised:
                return None
            stays = {o: rng.random() < (target if o == "dagger" else kept) for o in row.objects}
            return tuple(o for o in row.objects if stays[o]) or ("banana",)

        samples = make_samples(rows, seen)
        results = summarise(
            samples, base, name=name, concept=Concept("dagger"), suite=of, rows=rows_hash(rows), cost=Cost(1.5, 300.0, 0.5, 0.4)
        )
        return Entry(results, samples)

    return make


class FakePipe:
    """Draws each image from its own generator alone; remembers every seed it was asked for."""

    dtype = torch.float32

    def __init__(self, fail_at: int | None = None, spoil: float | None = None) -> None:
        self.scheduler: Any = SimpleNamespace()
        self.safety_checker: object | None = object()
        self.calls, self.fail_at, self.spoil = 0, fail_at, spoil
        self.drawn: list[int] = []
        self.guidances: list[float] = []

    def set_progress_bar_config(self, **config: Any) -> None:
        self._progress_bar_config = config

    def __call__(
        self, *, generator: list[torch.Generator], guidance_scale: float, height: int, width: int, output_type: str, **_: Any
    ) -> SimpleNamespace:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        assert output_type == "pt" and self.safety_checker is None and self._progress_bar_config["disable"]
        self.drawn += [g.initial_seed() for g in generator]
        self.guidances.append(guidance_scale)
        images = torch.stack([torch.rand(3, height, width, generator=g) for g in generator])
        if self.spoil is not None:
            images[-1] = self.spoil
        return SimpleNamespace(images=images)


@pytest.fixture(scope="module")
def fake_pipe() -> type[FakePipe]:
    return FakePipe


@pytest.fixture(scope="module")
def small_protocol(demo: suite.Suite) -> protocol.Protocol:
    return demo.protocol.changed(scheduler="SimpleNamespace", height=16, width=16)
