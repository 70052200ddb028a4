"""``erasure evaluate`` on prompt suites: a tiny Stable Diffusion on disk, our own prompts, stand-ins for large networks."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image
from torch import Tensor

from erasure import artifact
from erasure.cli.main import main
from erasure.eval import recipes as recipe_module
from erasure.eval import scoring, weights
from erasure.eval.detectors import Box, Detection, Identity, missing
from erasure.eval.metrics import metrics
from erasure.eval.metrics.base import SampleMetric
from erasure.eval.recipes import load_recipe
from erasure.eval.results import read
from erasure.eval.rows import Row
from erasure.eval.score import read_samples
from erasure.registry import Entry
from tests.tiny import sd1

NOUNS = ["cat", "dog"] * 4
PROMPTS = "prompt,key,topic\n" + "".join(f"a photo of a {'big ' * (i // 4)}{noun},{i},{noun}\n" for i, noun in enumerate(NOUNS))
SUITE: dict[str, Any] = {
    "name": "mine",
    "version": 1,
    "summary": "Ours",
    "source": "prompts",
    "ranked": True,
    "concept": "nudity",
    "prompts": {
        "source": {"github": "owner/name", "revision": "0" * 40, "files": [{"path": "mine.csv"}]},
        "content": "benign",
        "licence": "Apache-2.0",
        "columns": {"prompt": "prompt", "id": "key", "category": "topic"},
        "kind": "implied",
        "sample": "neutral.csv",
    },
    "recipes": ["rece", "mace", "safree"],
    "metrics": ["level"],
    "protocol": {"scheduler": "DDIMScheduler", "steps": 2, "guidance": 3.0, "height": 16, "width": 16},
}
BREAST = "FEMALE_BREAST_EXPOSED"


class Level(SampleMetric):
    """Mean level of an image."""

    name, fields, higher_is_better = "level", ("level",), True

    def measure(self, images: Tensor, rows: Sequence[Row], base: Tensor | None) -> Tensor:
        return images.float().mean((1, 2, 3))[:, None]

    def identity(self) -> dict[str, Any]:
        return {"name": "level", "sha256": "0" * 64}


class Bright:
    """NudeNet's stand-in: a box where the middle pixel is red enough."""

    name, asked = "nudenet", 0

    def identity(self) -> Identity:
        call = load_recipe("mace").calls[0]
        return Identity("nudenet", "3", "320n.onnx", call.sha256, (*call.labels, "FACE_FEMALE"), "none", stored_from=0.05)

    def detect(self, images: Sequence[Image.Image]) -> list[Detection]:
        Bright.asked += len(images)
        scores = [round(float(np.asarray(i)[8, 8, 0]) / 255, 4) for i in images]
        return [Detection((Box(BREAST, s, (0, 0, 4, 4)),) if s >= 0.05 else ()) for s in scores]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model, an artefact on it, prompts and suites."""
    desk = tmp_path_factory.mktemp("desk")
    sd1().save_pretrained(desk / "model", safe_serialization=True)
    (desk / "mine.csv").write_text(PROMPTS)
    (desk / "mine.yaml").write_text(yaml.safe_dump(SUITE))
    benign = {**SUITE, "name": "benign", "prompts": {**SUITE["prompts"], "kind": "over_refusal"}, "recipes": []}
    (desk / "benign.yaml").write_text(yaml.safe_dump(benign))
    assert run("erase uce --model model --device cpu --target cat --anchor dog --out cat -q", desk) == 0
    return desk


def run(command: str, desk: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        return main(shlex.split(command))


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Bright.asked = 0
    monkeypatch.setitem(metrics.builtin, "level", Entry(f"{__name__}:Level", "stand-in"))
    monkeypatch.setattr(scoring, "load", lambda name: Bright())
    monkeypatch.setattr(scoring, "missing", lambda name: "")
    monkeypatch.setattr(recipe_module, "missing", lambda name: "" if name == "nudenet" else missing(name))
    monkeypatch.setenv("ERASURE_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


ON = "--model model --device cpu --suite {suite}.yaml --prompts mine.csv --batch-size 4 -q"


def evaluate(desk: Path, out: Path, what: str = "cat", more: str = "", suite: str = "mine") -> int:
    return run(f"evaluate {what} {ON.format(suite=suite)} --out {out} {more}", desk)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_prompt_suite_from_nothing_to_results(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert evaluate(desk, out, more="--json") == 0
    table = json.loads(capsys.readouterr().out)
    base, own = (read(out / "results" / name / "results.json") for name in ("base", "cat"))
    samples = {name: read_samples(out / "results" / name / "samples.jsonl") for name in ("base", "cat")}
    assert [row["name"] for row in table["rows"]] == ["base", "cat"] and base["artefact"] is None and own["n"] == 8
    assert own["artefact"]["method"] == "uce" and len(own["artefact"]["eraser"]) == 64
    assert own["model"]["id"] == "model" and own["model"] == base["model"]
    assert own["detectors"]["nudenet"]["sha256"] == load_recipe("mace").calls[0].sha256
    assert own["unavailable"]["safree"].startswith("needs classifier_model.onnx") and set(own["recipes"]) == {"rece", "mace"}

    def red(name: str, sample: Any) -> float:
        path = next((out / "images" / name).rglob(f"{sample.id}.png"))
        return round(float(np.asarray(Image.open(path).convert("RGB"))[8, 8, 0]) / 255, 4)

    for name, found in (("base", base), ("cat", own)):
        unsafe = [red(name, s) > load_recipe("rece").calls[0].threshold for s in samples[name]]
        assert [s.unsafe["rece"] for s in samples[name]] == unsafe
        assert found["recipes"]["rece"]["rate"]["k"] == sum(unsafe) and found["recipes"]["rece"]["rate"]["n"] == 8
        levels = [np.asarray(Image.open(next((out / "images" / name).rglob(f"{s.id}.png")))).mean() for s in samples[name]]
        assert [s.scores["level.level"] for s in samples[name]] == pytest.approx(levels, abs=1e-3)
        assert found["metrics"]["level"]["value"] == pytest.approx(np.mean(levels), abs=1e-3)
        assert {k: v["n"] for k, v in found["recipes"]["rece"]["by_category"].items()} == {"cat": 4, "dog": 4}
    swept = own["recipes"]["rece"]["sweep"]
    assert [s["threshold"] for s in swept] == [round(0.05 * i, 2) for i in range(1, 20)]
    assert swept[7]["rate"]["k"] == sum(red("cat", s) > 0.4 for s in samples["cat"])
    paired = own["metrics"]["level"]["difference"]
    assert paired["value"] == pytest.approx(own["metrics"]["level"]["value"] - base["metrics"]["level"]["value"], abs=1e-4)
    assert "difference" in own["recipes"]["rece"]["rate"] and "difference" not in base["recipes"]["rece"]["rate"]
    for name in ("table.md", "table.csv", "compare.json", "report.html", "images/cat/detections-nudenet.jsonl"):
        assert (out / name).stat().st_size > 0
    assert "recipe safree is left out" not in (out / "table.md").read_text() and "rece ↓ n=8" in (out / "table.md").read_text()


def test_another_recipe_on_stored_detections_looks_at_no_image_again(desk: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert evaluate(desk, out, "base", "--recipe rece --metrics ''") == 0
    assert Bright.asked == 8
    assert evaluate(desk, out, "base", "--recipe spm,uda --metrics ''") == 0
    assert Bright.asked == 8 and set(read(out / "results/base/results.json")["recipes"]) == {"spm", "uda"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--recipe rece,safree", r"recipe safree needs classifier_model\.onnx \(https://github.com/notAI-tech/NudeNet"),
        ("--recipe rese", "no recipe 'rese'.*did you mean rece"),
        ("--recipe rece,rece", "--recipe has rece twice"),
        ("--recipe ,", "--recipe is empty"),
        ("--metrics levle", "no metric 'levle'.*did you mean level"),
        ("--metrics fid", r"inception weights are missing \(HF_HUB_OFFLINE.*weights-inception-2015-12-05-6726825d.pth.*6726825d0af5"),
        ("--reference gone --metrics fid", "no reference images at gone"),
        ("--reference model", "--reference is for fid, kid and cmmd"),
        ("--workers -1", "Must be >= 0"),
    ],
)
def test_what_cannot_score_is_said_before_anything_is_made(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    monkeypatch.setattr(weights, "_search", lambda weight: None)
    out = tmp_path / "out"
    assert evaluate(desk, out, more=options) == 2
    shown = capsys.readouterr()
    assert re.search(message, " ".join(shown.err.split())) and "Traceback" not in shown.err
    assert not out.exists()


def test_weights_of_the_wrong_hash(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / weights.WEIGHTS["inception"].file).write_bytes(b"something else")
    assert evaluate(desk, tmp_path / "out", more="--metrics fid") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is not the inception weights: its SHA-256 is" in said and "expected 6726825d0af5" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PROMPTS + "a dog,0,dog\n", "1 keys of the column 'key' come more than once: 0"),
        (PROMPTS + ",99,dog\n", "(no|without|empty) prompt|prompt"),
        ("text,key,topic\na dog,1,dog\n", "no column 'prompt'"),
        ("prompt,key,topic\n", "has no rows"),
    ],
)
def test_bad_prompts(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (tmp_path / "bad.csv").write_text(text)
    command = f"evaluate base {ON.format(suite='mine')} --out {tmp_path / 'out'}".replace("mine.csv", str(tmp_path / "bad.csv"))
    assert run(command, desk) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "is missing or damaged"),
        (lambda path: path.unlink(), "is missing or damaged"),
    ],
)
def test_bad_images_leave_no_results(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], Any], message: str
) -> None:
    out = tmp_path / "out"
    assert run(f"generate base {ON.format(suite='mine')} --out {out}", desk) == 0
    spoil(next(out.rglob("implied-00003.png")))
    before = contents(out)
    assert evaluate(desk, out, "base") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said and "implied-00003.png" in said and "generate again" in said
    assert contents(out) == before


def test_over_refusal_counts_black_images_and_the_loss_of_the_others(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from erasure.eval import generate

    out = tmp_path / "out"
    assert evaluate(desk, out, "base", suite="benign") == 0
    real = generate._check
    monkeypatch.setattr(generate, "_check", lambda images, rows, shape, dtype: real(_black(images, rows), rows, shape, dtype))
    assert evaluate(desk, out, "cat", suite="benign") == 0
    own, base = (read(out / "results" / name / "results.json") for name in ("cat", "base"))
    refused = own["over_refusal"]["refused"]
    assert (refused["k"], refused["n"], refused["difference"]["gained"]) == (2, 8, 2)
    assert base["over_refusal"]["refused"]["k"] == 0
    assert {label: rate["k"] for label, rate in own["over_refusal"]["by_category"].items()} == {"cat": 1, "dog": 1}
    answered = [[s for s in read_samples(out / "results" / name / "samples.jsonl") if not s.refused] for name in ("cat", "base")]
    levels = [{s.id: s.scores["level.level"] or 0 for s in some} for some in answered]
    change = np.mean([levels[0][row] - levels[1][row] for row in levels[0]])
    degraded = own["over_refusal"]["degradation"]["level"]
    assert degraded["n"] == 6 and degraded["value"] == pytest.approx(change, abs=1e-4)
    assert "refused ↓ n=8" in (out / "table.md").read_text()


def _black(images: Tensor, rows: Sequence[Row]) -> Tensor:
    for i, row in enumerate(rows):
        if row.seed in (1, 2):
            images[i] = 0
    return images


def test_the_card_gets_table_and_metadata_once_and_the_artefact_stays_whole(desk: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "card", tmp_path / "out"
    shutil.copytree(desk / "cat", folder)
    state = (folder / "erasure_state.safetensors").read_bytes()
    before = (folder / "README.md").read_text()
    for _ in range(2):
        assert evaluate(desk, out, str(folder), "--update-card") == 0
        card = (folder / "README.md").read_text()
    assert card.count("## Measured") == 1 and "| card |" in card and "**Known limits.**" in card
    assert card.startswith("---\n") and before.split("---\n", 2)[2].strip() in card
    artifact.load_eraser(folder)
    assert run(f"verify {folder} --model model --device cpu -q", desk) == 0
    assert (folder / "erasure_state.safetensors").read_bytes() == state and not list(tmp_path.glob(".*"))
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in measured(card)}
    results = read(out / "results/card/results.json")
    assert found["mine", "recipe:rece"] == results["recipes"]["rece"]["rate"]["rate"]
    assert found["mine", "metric:level"] == results["metrics"]["level"]["value"]
    assert evaluate(desk, tmp_path / "benign", str(folder), "--update-card", "benign") == 0
    again = (folder / "README.md").read_text()
    assert {r.dataset_type for r in measured(again)} == {"mine", "benign"} and again.count("## Measured") == 2
    artifact.load_eraser(folder)


def measured(card: str) -> list[EvalResult]:
    """As the hub reads it."""
    data = ModelCard(card).data
    assert isinstance(data, ModelCardData)
    return data.eval_results or []


def test_the_base_has_no_card(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(desk, tmp_path / "out", "base", "--update-card") == 2
    assert "the base is none" in " ".join(capsys.readouterr().err.split())


def test_a_bench_scores_with_what_it_is_told(desk: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench"
    bench = f"bench {ON.format(suite='mine')} --target cat --anchor dog --methods uce --recipe uda --metrics level --workers 1 --out {out}"
    assert run(bench, desk) == 0
    assert {name: set(read(out / "results" / name / "results.json")["recipes"]) for name in ("base", "uce")} == {
        "base": {"uda"},
        "uce": {"uda"},
    }
    assert run(bench.replace("uda", "safree"), desk) == 2
