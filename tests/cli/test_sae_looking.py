"""``erasure sae inspect`` and ``sae detect``."""

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from scipy.stats import mannwhitneyu

from erasure.cli.main import main
from erasure.cli.sae_detect import asked, measure
from erasure.concept import load

ON = ["--model", "canvas", "--device", "cpu"]


def detect(*arguments: str) -> int:
    return main(["sae", "detect", *ON, "--concept", "dagger", *arguments])


def test_inspect_says_what_the_page_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    arguments = ["--concept", "dagger", "--out", str(page), "--steps", "1", "--top", "2", "--json"]
    assert main(["sae", "inspect", *ON, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    features, text = found["features"], page.read_text()
    assert found["concepts"] == ["dagger"] and features[0]["concepts"][0][0] == "dagger"
    assert text.count('<article class="feature"') == 2 and text.count("data:image/png;base64,") == 3 * 6
    for one in features:
        assert f">{one['index']}<" in text
    peak = features[0]["prompts"][0]
    heats = re.findall(r'--heat: ([\d.]+)" title="([^"]*)"', text)
    assert heats[: len(peak["tokens"])] == [
        (str(round(abs(t["code"] / peak["peak"]), 3)), f"{t['text']}: {t['code']:.2f}" if t["code"] else f"{t['text']}: 0")
        for t in peak["tokens"]
    ]
    assert not re.search(r'(src|href)="(?!data:|#)', text), "nothing is fetched"
    assert found["spared"] and all(one["phrases"] for one in found["spared"])


def test_inspect_without_images_and_with_a_coder_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["--hookpoint", "text_encoder.layers.1", "--latents", "512", "--k", "8", "--steps", "60", "--out", str(tmp_path / "sae")]
    assert main(["-q", "sae", "train", *ON, *train, "--json"]) == 0
    capsys.readouterr()
    page = tmp_path / "page.html"
    arguments = ["--concept", "pizza", "--sae", str(tmp_path / "sae"), "--k", "8", "--no-images", "--out", str(page)]
    assert main(["sae", "inspect", *ON, *arguments]) == 0
    out = capsys.readouterr().out
    assert re.search(r"feature\s+score\s+top concepts\s+faintly shared with", out)
    text = page.read_text()
    assert "<img" not in text and "text_encoder.layers.1, 512 latents, 8 on at once" in text


def test_detect_says_score_threshold_and_decision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,more\na dagger on a table,x\na banana,y\na banana,z\n")
    assert detect("--prompts", str(file), "--json") == 0
    dagger, banana = json.loads(capsys.readouterr().out)
    assert (dagger["prompt"], dagger["decision"], banana["decision"]) == ("a dagger on a table", "concept", "other")
    assert dagger["score"] >= dagger["threshold"] == banana["threshold"] > banana["score"]


def test_detect_reads_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a dagger\n\na cat\n")))
    assert detect("--prompts", "-", "--json") == 0
    assert [(r["prompt"], r["decision"]) for r in json.loads(capsys.readouterr().out)] == [("a dagger", "concept"), ("a cat", "other")]


def test_evaluate_is_the_auc_of_the_same_scores(capsys: pytest.CaptureFixture[str]) -> None:
    assert detect("--prompts", "canvas-demo", "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert detect("--prompts", "canvas-demo", "--evaluate", "--json") == 0
    lines = {line["prompts"]: line for line in json.loads(capsys.readouterr().out)}
    assert list(lines) == ["named", "implied", "unrelated"]
    sides = {name: [r for r in records if r["kind"] in kinds] for name, kinds in
             (("named", ("named", "pair")), ("implied", ("implied",)), ("unrelated", ("neighbour", "other")))}  # fmt: skip
    for name, of in sides.items():
        assert lines[name]["n"] == len(of)
        assert lines[name]["called"] == sum(r["decision"] == "concept" for r in of) / len(of)
    scores = {name: [r["score"] for r in of] for name, of in sides.items()}
    for name in ("named", "implied"):
        u = mannwhitneyu(scores[name], scores["unrelated"]).statistic
        assert lines[name]["auc"] == pytest.approx(u / len(scores[name]) / len(scores["unrelated"]))
        low, high = lines[name]["auc_interval"]
        assert low <= lines[name]["auc"] <= high and low < 1
    assert detect("--prompts", "canvas-demo", "--evaluate") == 0
    assert "ROC-AUC" in capsys.readouterr().out


def test_a_prompt_counts_once_with_its_first_kind(tmp_path: Path) -> None:
    rows = asked("canvas-demo", (load("dagger", canvas=True),))
    assert len({text for text, _ in rows}) == len(rows) and {kind for _, kind in rows} >= {"named", "implied", "other"}


def test_measure_by_hand() -> None:
    scores = [("named", 3.0), ("pair", 1.0), ("neighbour", 1.0), ("other", 0.0)]
    lines = measure([{"kind": kind, "score": s, "threshold": 2, "decision": "concept" if s >= 2 else "other"} for kind, s in scores])
    assert [line["prompts"] for line in lines] == ["named", "unrelated"]
    assert lines[0]["auc"] == pytest.approx(3.5 / 4) and lines[0]["called"] == 0.5 and lines[1]["called"] == 0


CASES = [
    (["inspect", "--concept", "dager"], "no canvas concept 'dager'.*did you mean dagger"),
    (["inspect"], "nothing to erase: give --concept or --target"),
    (["inspect", "--concept", "dagger", "--sae", "gone"], "no sparse coder in 'gone'.*erasure sae train"),
    (["inspect", "--concept", "dagger", "--sae", "wide"], "text_encoder.layers.2 is 160 wide, and the coder was made for 32"),
    (["inspect", "--concept", "dagger", "--sae", "deep"], "no hookpoint 'text_encoder.layers.9'; it has text_encoder.layers.0 to 2"),
    (["inspect", "--concept", "dagger", "--k", "0"], "--k.*Must be >= 1"),
    (["inspect", "--concept", "dagger", "--out", "wide"], "wide is a folder.*give the name of an .html file"),
    (["inspect", "--concept", "dagger", "--out", "gone/page.html"], "lies in none that exists"),
    (["inspect", "--concept", "dagger", "--prompts", "empty.txt"], "empty.txt has no rows"),
    (["detect", "--concept", "dager", "--prompts", "some.txt"], "no canvas concept 'dager'"),
    (["detect", "--concept", "dagger"], "--prompts requires an argument"),
    (["detect", "--concept", "dagger", "--prompts", "empty.txt"], "empty.txt has no rows.*at least one prompt"),
    (["detect", "--concept", "dagger", "--prompts", "blank.csv"], "blank.csv holds no prompts"),
    (["detect", "--concept", "dagger", "--prompts", "text.csv"], "text.csv has no column 'prompt', but text.*rename"),
    (["detect", "--concept", "dagger", "--prompts", "gone.txt"], "no file gone.txt; check the path"),
    (["detect", "--concept", "dagger", "--prompts", "canvass"], "no suite 'canvass'.*did you mean canvas"),
    (["detect", "--concept", "dagger", "--concept", "bomb", "--prompts", "canvas"], "depends on the concept: give one --concept, not 2"),
    (["detect", "--concept", "dagger", "--prompts", "some.txt", "--evaluate"], "some.txt has none that are unrelated.*such as canvas"),
    (["detect", "--concept", "dagger", "--prompts", "some.txt", "--sae", "wide"], "160 wide, and the coder was made for 32"),
]


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_bad_input_is_told(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from erasure.methods.sae import SparseCoder, SparseCoderConfig

    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n\n")
    Path("blank.csv").write_text('prompt,more\n"",x\n')
    Path("text.csv").write_text("text\na cat\n")
    Path("some.txt").write_text("a cat\n")
    for name, width, layer in (("wide", 32, 2), ("deep", 160, 9)):
        SparseCoder(SparseCoderConfig(d_in=width, num_latents=64, k=4, hookpoint=f"text_encoder.layers.{layer}")).save(name)
    assert main(["sae", arguments[0], *ON, *arguments[1:]]) == 2
    said = capsys.readouterr()
    assert re.search(message, " ".join(said.err.split())), said.err
    assert said.out == "" and "Traceback" not in said.err


def test_the_page_of_a_sensitive_concept_is_blurred(tmp_path: Path) -> None:
    from PIL import Image

    from erasure.eval.report.features import strip, write_page

    shots = strip("<b>bad</b>", [0.0, 1.0], [Image.new("RGB", (8, 8), c) for c in ("red", "blue")])
    match = {"prompt": "<b>bad</b>", "peak": -2.0, "tokens": [{"text": "<b>", "code": -2.0}]}
    one = {"index": 7, "hookpoint": "h", "score": -2.0, "concepts": [["x", -2.0]], "prompts": [match], "shared": [["", 1.0]]}
    page = {
        "title": "t",
        "concept": "c",
        "model": "m",
        "coders": ["h"],
        "k": 4,
        "spared": [],
        "together": None,
        "command": "x",
        "facts": {},
    }
    for sensitive in (True, False):
        features = [{**one, "shown": True, "strip": shots}]
        text = write_page(tmp_path / "page.html", {**page, "features": features, "sensitive": sensitive}).read_text()
        assert ('class="frame hidden"' in text) == sensitive and text.count('<input type="checkbox"') == 2 * sensitive
        assert "<b>bad" not in text and "&lt;b&gt;bad" in text and 'class="token cold' in text
        assert 'title="&lt;b&gt;: −2.00"' in text and "the bare sentence" in text
