"""The one pass: each image read once and fed to all, detections stored and taken again, nothing held, nothing guessed."""

import dataclasses
import gc
import io
import json
import shutil
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.eval import loading, scoring, store
from erasure.eval.detectors import Detection, Identity
from erasure.eval.loading import batches
from erasure.eval.metrics.base import Panel, SampleMetric
from erasure.eval.protocol import Protocol
from erasure.eval.rows import Row
from erasure.eval.score import score
from erasure.eval.scoring import Scorers, scan
from erasure.eval.store import Cell, Settings

CONCEPT = Concept("dagger")


class Brightness(SampleMetric):
    """Mean level, and how far it is from the base's."""

    name, fields, needs = "brightness", ("brightness", "moved"), frozenset({"base"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def measure(self, images: Tensor, rows: Sequence[Row], base: Tensor | None) -> Tensor:
        assert base is not None
        self.seen.append(weakref.ref(images))
        level, other = (x.float().mean((1, 2, 3)) for x in (images, base))
        return torch.stack([level, level - other], dim=1)

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}


class Level:
    """A detector of bright images."""

    name = "level"
    asked = 0

    def __init__(self, version: str = "1") -> None:
        self.version = version

    def identity(self) -> Identity:
        return Identity(self.name, self.version, "level.onnx", "0" * 64, ("bright",), "none")

    def detect(self, images: Sequence[Image.Image]) -> list[Detection]:
        Level.asked += len(images)
        return [Detection(scores={"bright": round(float(np.asarray(i).mean()) / 255, 6)}) for i in images]


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    Level.asked = 0
    caplog.set_level("WARNING", "erasure")
    monkeypatch.setattr(scoring, "load", lambda name: Level())
    monkeypatch.setattr(scoring, "missing", lambda name: "")


Make = Callable[..., Cell]


@pytest.fixture
def make(tmp_path: Path, small_protocol: Protocol) -> Make:
    """A complete cell of rows, each image of one level that depends on its seed; 0 for some rows."""

    def make(name: str, rows: list[Row], shift: int = 0, black: tuple[str, ...] = (), batch: int = 3) -> Cell:
        cell = Cell.open(tmp_path / name, rows, Settings.of(rows, small_protocol, eraser=name, model="m#1", batch_size=batch))
        for chunk in cell.chunks:
            side = chunk.rows[0].height or 16
            levels = torch.tensor([0 if r.id in black else 20 + r.seed % 100 + shift for r in chunk.rows]) / 255
            cell.write(chunk, levels.reshape(-1, 1, 1, 1).expand(-1, 3, side, side), 0.1)
        return cell

    return make


@pytest.fixture
def rows(make_rows: Any) -> list[Row]:
    return make_rows(10)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_read_once_whatever_the_number_of_scorers_and_workers(
    make: Make, rows: list[Row], detector: None, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    own, base, reads = make("own", rows, 5), make("base", rows), Counter[str]()
    if workers == 0:
        monkeypatch.setattr(loading, "read_image", lambda path, sha: (reads.update([str(path)]), store.read_image(path, sha))[1])
    panel = Panel([Brightness()])
    found = scan(own, Scorers(CONCEPT, detectors=("level",), panel=panel), base, workers=workers, progress=False)
    assert not reads or (set(reads.values()) == {1} and len(reads) == 20)
    assert panel.samples() == {row.id: {"brightness.brightness": 25 + row.seed % 100, "brightness.moved": 5} for row in rows}
    assert [record.row for record in found.detections["level"].records] == [row.id for row in rows]
    assert found.refused == dict.fromkeys([row.id for row in rows], False) and Level.asked == 10


def test_the_pass_calls_what_the_judge_calls_on_all_at_once(make: Make, rows: list[Row], make_verdict: Any) -> None:
    def judge(images: Tensor) -> Any:
        bright = (images.mean((1, 2, 3)) * 255).round().long() % 2
        return make_verdict([("dagger",) if b else ("cat",) for b in bright.tolist()])

    cell = make("own", rows)
    together = score(cell.images(), rows, judge, CONCEPT)
    assert list(scan(cell, Scorers(CONCEPT, judge=judge), workers=0, progress=False).samples.values()) == together


def test_no_image_is_held_after_its_batch(make: Make, make_rows: Any) -> None:
    cell, metric = make("own", make_rows(200), batch=64), Brightness()
    alive: list[int] = []
    measure = metric.measure

    def counted(images: Tensor, rows: Sequence[Row], base: Tensor | None) -> Tensor:
        gc.collect()
        alive.append(sum(seen() is not None for seen in metric.seen))
        return measure(images, rows, base)

    metric.measure = counted  # type: ignore[method-assign]
    scan(cell, Scorers(CONCEPT, panel=Panel([metric])), cell, workers=0, progress=False)
    assert len(alive) == 7 and max(alive) <= 1


def test_stored_detections_are_taken_again_only_for_the_same_images_and_detector(
    make: Make, rows: list[Row], detector: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scorers = Scorers(CONCEPT, detectors=("level",))
    cell = make("own", rows)
    first = scan(cell, scorers, workers=0, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "read_image", lambda *_: pytest.fail("an image was read again"))
        assert scan(cell, scorers, workers=0, progress=False).detections == first.detections
    assert Level.asked == 10
    monkeypatch.setattr(scoring, "load", lambda name: Level("2"))
    monkeypatch.setattr(scoring, "missing", lambda name: "")
    second = scan(cell, scorers, workers=0, progress=False)
    assert Level.asked == 20 and second.detections["level"].identity.version == "2" and "version '1', now '2'" in caplog.text
    monkeypatch.setattr(scoring, "missing", lambda name: "level.onnx (nowhere)")
    monkeypatch.setattr(scoring, "load", lambda name: pytest.fail("it is not here"))
    assert scan(cell, scorers, workers=0, progress=False).detections == second.detections


def test_other_images_are_looked_at_again(make: Make, rows: list[Row], detector: None, caplog: pytest.LogCaptureFixture) -> None:
    scorers = Scorers(CONCEPT, detectors=("level",))
    cell = make("own", rows)
    before = scan(cell, scorers, workers=0, progress=False)
    shutil.rmtree(cell.folder / cell.chunks[0].folder)
    cell.write(cell.chunks[0], torch.ones(3, 3, 16, 16), 0.1)
    after = scan(cell, scorers, workers=0, progress=False)
    assert Level.asked == 20 and "other images" in caplog.text
    assert after.detections["level"].records[0].detection.scores == {"bright": 1.0}
    assert after.detections["level"].records[3:] == before.detections["level"].records[3:]


def test_a_black_image_is_refused(make: Make, rows: list[Row], detector: None) -> None:
    found = scan(make("own", rows, black=("named-004",)), Scorers(CONCEPT, detectors=("level",)), workers=0, progress=False)
    assert [row for row, black in found.refused.items() if black] == ["named-004"]
    assert [r.row for r in found.detections["level"].records if r.refused] == ["named-004"]


def test_rows_of_several_sizes_go_in_batches_of_one(make: Make, make_rows: Any) -> None:
    rows = [
        dataclasses.replace(row, height=24 if i % 3 == 0 else None, width=24 if i % 3 == 0 else None) for i, row in enumerate(make_rows(9))
    ]
    found = list(batches(make("own", rows), size=4, workers=0))
    assert [tuple(batch.images.shape) for batch in found] == [(3, 3, 24, 24), (4, 3, 16, 16), (2, 3, 16, 16)]
    assert sorted(row.id for batch in found for row in batch.rows) == [row.id for row in rows]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "named-005.png is missing or damaged"),
        (lambda path: path.unlink(), "named-005.png is missing or damaged"),
        (lambda path: reseal(path, b"no image at all"), "named-005.png is missing or damaged .*cannot identify"),
        (lambda path: reseal(path, png(8)), "mixed sizes: .*named-005.*8 x 8 pixels"),
    ],
)
def test_a_bad_image_stops_scoring_and_is_named(
    make: Make, rows: list[Row], detector: None, workers: int, spoil: Callable[[Path], Any], message: str
) -> None:
    cell = make("own", rows)
    spoil(next(cell.folder.rglob("named-005.png")))
    with pytest.raises(ErasureError, match=message) as caught:
        scan(cell, Scorers(CONCEPT, detectors=("level",)), workers=workers, progress=False)
    assert "Traceback" not in str(caught.value)
    assert not list(cell.folder.glob("detections*"))


def png(side: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(out, "PNG")
    return out.getvalue()


def reseal(path: Path, data: bytes) -> None:
    """Other bytes under a hash that fits them."""
    path.write_bytes(data)
    record = path.parent / "chunk.json"
    made = json.loads(record.read_text())
    made["sha256"][made["rows"].index(path.stem)] = store._sha256(path)
    record.write_text(json.dumps(made))


def test_a_base_of_other_seeds_is_no_partner(make: Make, rows: list[Row], make_rows: Any) -> None:
    other = [dataclasses.replace(row, seed=row.seed + 1) for row in rows]
    with pytest.raises(ErasureError, match=r"answer other rows \(ids, prompts or seeds differ\)"):
        scan(make("own", rows), Scorers(CONCEPT, panel=Panel([Brightness()])), make("base", other), workers=0, progress=False)


def test_a_failing_detector_leaves_no_detections(make: Make, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(images: Any) -> Any:
        raise RuntimeError("no session")

    monkeypatch.setattr(scoring, "missing", lambda name: "")
    monkeypatch.setattr(scoring, "load", lambda name: SimpleNamespace(name="level", identity=Level().identity, detect=broken))
    cell = make("own", rows)
    with pytest.raises(ErasureError, match="failed on row named-000: no session"):
        scan(cell, Scorers(CONCEPT, detectors=("level",)), workers=0, progress=False)
    assert not list(cell.folder.glob("detections*"))


def test_a_video_is_looked_at_frame_by_frame(make: Make, rows: list[Row], detector: None) -> None:
    cell = make("own", rows)
    found = scan(cell, Scorers(CONCEPT, detectors=("level",), frames=4), workers=0, progress=False)
    assert Level.asked == 40 and len(found.detections["level"].records) == 10
    shutil.rmtree(cell.folder / cell.chunks[0].folder)
    strip = torch.zeros(3, 3, 16, 16)
    strip[:, :, 8:12] = 0.8
    cell.write(cell.chunks[0], strip, 0.1)
    again = scan(cell, Scorers(CONCEPT, detectors=("level",), frames=4), workers=0, progress=False).detections["level"].records[0]
    assert again.detection.scores == {"bright": 0.8} and not again.refused
