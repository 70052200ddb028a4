"""What the report says of a prompt suite's images, from samples and stored detections."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from erasure.eval.detectors import Box, Detection, Identity, Record, detections_path
from erasure.eval.detectors.records import write_detections
from erasure.eval.recipes import load_recipe
from erasure.eval.report import Gallery, Shot
from erasure.eval.report.scored import gallery
from erasure.eval.score import Sample
from erasure.eval.store import Cell, Settings
from erasure.eval.suite import Suite, load_suite

MACE, RECE = load_recipe("mace"), load_recipe("rece")
NAME = "highest score of recipe mace"
BOX = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def nudity() -> Suite:
    return load_suite("i2p-sexual").sample()


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory, nudity: Suite) -> Cell:
    """Three images of the suite's sample: one with findings, one with a face alone, one black."""
    rows = nudity.rows(nudity.default_concept())
    settings = Settings.of(rows, nudity.protocol, eraser="base", model="fake", batch_size=8)
    made = Cell.open(tmp_path_factory.mktemp("cell"), rows, settings)
    for chunk in made.chunks:
        made.write(chunk, torch.rand(len(chunk.rows), 3, 8, 8), 1.0)
    call = MACE.calls[0]
    identity = Identity("nudenet", call.version, "f", call.sha256, (*call.labels, "FACE_FEMALE"), "AGPL-3.0", 0.05)
    boxes = [("BELLY_EXPOSED", 0.41), ("FEMALE_BREAST_EXPOSED", 0.83), ("FACE_FEMALE", 0.97), ("FEET_EXPOSED", 0.2)]
    found = [Detection(tuple(Box(label, score, BOX) for label, score in some)) for some in (boxes, boxes[2:3], [])]
    write_detections(detections_path(made.folder, identity), identity, [Record(r.id, i == 2, found[i]) for i, r in enumerate(rows)])
    return made


def shown(suite: Suite, cell: Cell, *unsafe: dict[str, bool | None]) -> tuple[Gallery, list[Shot]]:
    samples = [
        Sample(row.id, row.kind, row.prompt, row.seed, refused=i == 2, unsafe=unsafe[i], scores={"clip.score": 20.0 + i, "none": None})
        for i, row in enumerate(cell.rows)
    ]
    made = gallery(suite, suite.default_concept(), {"base": (cell, samples)}, [MACE, RECE])
    return made, list(made.shots)


CALLS: tuple[dict[str, bool | None], ...] = ({"mace": True, "rece": False}, {"mace": False, "rece": False}, {"mace": None, "rece": None})


def test_recipes_give_outcomes_and_flags(nudity: Suite, cell: Cell) -> None:
    _, (unsafe, safe, refused) = shown(nudity, cell, *CALLS)
    assert [(s.status, s.tone) for s in (unsafe, safe, refused)] == [("unsafe by 1 of 2", "bad"), ("safe", "good"), ("refused", "")]
    assert [s.flagged for s in (unsafe, safe, refused)] == [True, False, False]
    assert unsafe.flags == {"unsafe by mace": True, "unsafe by rece": False} and refused.flags == {"refused": True}
    assert unsafe.note == "FACE_FEMALE 0.97, FEMALE_BREAST_EXPOSED 0.83, BELLY_EXPOSED 0.41"
    assert unsafe.categories == ("sexual",)


def test_a_recipes_slider_holds_its_own_labels_and_never_a_refused_image(nudity: Suite, cell: Cell) -> None:
    made, (unsafe, safe, refused) = shown(nudity, cell, *CALLS)
    assert unsafe.scores == {NAME: 0.83, NAME.replace("mace", "rece"): 0.83, "clip.score": 20.0}
    assert safe.scores[NAME] == 0.0, "a face is none of the recipe's labels"
    assert NAME not in refused.scores
    assert made.thresholds[NAME] == MACE.calls[0].threshold and made.lowest[NAME] == 0.05


def test_harmful_suites_are_blurred_and_benign_ones_are_not(nudity: Suite, cell: Cell) -> None:
    made, shots = shown(nudity, cell, *CALLS)
    assert made.sensitive == {nudity.name} and all(made.hides(shot) for shot in shots)
    assert nudity.prompts is not None
    benign = nudity.model_copy(update={"prompts": nudity.prompts.model_copy(update={"content": "benign"})})
    made, shots = shown(benign, cell, *CALLS)
    assert [made.hides(shot) for shot in shots] == [True, False, False], "what a recipe flags is blurred in any suite"


def test_a_refused_benign_prompt_is_bad_and_a_safe_one_is_no_success(nudity: Suite, cell: Cell) -> None:
    asked = replace(cell, rows=tuple(replace(row, kind="over_refusal") for row in cell.rows))
    _, (_, safe, refused) = shown(nudity, asked, *CALLS)
    assert (safe.status, safe.tone, refused.status, refused.tone) == ("safe", "", "refused", "bad")


def test_without_stored_detections_there_are_calls_and_no_slider(nudity: Suite, cell: Cell, tmp_path: Path) -> None:
    bare = replace(cell, folder=tmp_path)
    for path in cell.folder.iterdir():
        if not path.name.startswith("detections"):
            (tmp_path / path.name).symlink_to(path)
    made, (unsafe, *_) = shown(nudity, bare, *CALLS)
    assert unsafe.scores == {"clip.score": 20.0} and unsafe.flagged and made.lowest == {}
