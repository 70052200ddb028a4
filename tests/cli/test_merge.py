"""``erasure merge``: what is refused before a base is loaded, what is never lost or overwritten, and what the card says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import artifact, load_base, merging
from erasure.cli.main import main
from erasure.cli.options import Base
from erasure.concept import Concept
from erasure.manifest import CONFIG, sha256
from erasure.registry import Entry, methods
from tests import tiny
from tests.stand_ins import RandomLoRA

DAGGER, CAT = Concept("dagger", anchors=("cat",)), Concept("cat", anchors=("dog",))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.builtin, "random_lora", Entry("tests.stand_ins:RandomLoRA", "test"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny.sd1().save_pretrained(folder)
    return str(folder)


def expert(folder: Path, base: str, concept: Concept, seed: int = 0) -> str:
    pipe = load_base(base, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(seed)
    eraser = RandomLoRA().fit(pipe, [concept])
    factors = {key: 0.3 * torch.randn(tensor.shape, generator=draw) for key, tensor in eraser.factors.items()}
    artifact.save(replace(eraser, factors=factors), folder, pipe=pipe, base_id=base, seed=seed)
    return str(folder)


@pytest.fixture
def two(tmp_path: Path, base: str) -> list[str]:
    return [expert(tmp_path / "dagger", base, DAGGER, seed=3), expert(tmp_path / "cat", base, CAT, seed=4)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--density", "0.3"), "belong to --rule ties"),
        (("--trim", "vector", "--rule", "sum"), "belong to --rule ties"),
        (("--density", "0", "--rule", "ties"), "Must be > 0"),
        (("--density", "1.5", "--rule", "ties"), "Must be <= 1"),
        (("--scale", "0"), "Must be > 0"),
        (("--scale", "inf"), "Must be < inf"),
        (("--out", "letters"), "is not empty and holds no artefact"),
        (("--out", "cat/../dagger"), "is one of the experts"),
    ],
)
def test_what_cannot_be_is_said_before_a_base_is_loaded(
    options: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dagger", "cat", "letters"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("dear.txt" if name == "letters" else CONFIG)).write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Base, "load", lambda self: pytest.fail("the base was loaded"))
    out = () if "--out" in options else ("--out", "out")
    assert main(["merge", "dagger", "cat", "--model", "canvas", *out, *options]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_one_name_for_two_meanings_is_refused_until_one_is_renamed(tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An expert of other targets would be merged in, and its targets be missing from the artefact's."""
    weapon = [Concept("weapon", targets=targets, anchors=("cat",)) for targets in (("dagger", "knife"), ("boat",))]
    folders = [expert(tmp_path / str(i), base, concept, seed=i) for i, concept in enumerate(weapon)]
    command = ["merge", *folders, "--model", base, "--rule", "sum", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in (*folders, "weapon", "targets: ['dagger', 'knife'] and ['boat']"))
    config = json.loads((tmp_path / "1" / CONFIG).read_text())
    config["concepts"][0]["name"] = "boat"
    (tmp_path / "1" / CONFIG).write_text(json.dumps(config))
    assert main(command) == 0
    merged, _ = artifact.load_eraser(tmp_path / "out")
    assert [concept.targets for concept in merged.concepts] == [("dagger", "knife"), ("boat",)]


def test_the_card_names_every_expert_and_the_merged_rank(two: list[str], tmp_path: Path, base: str) -> None:
    assert main(["merge", *two, "--model", base, "--rule", "sum", "--scale", "0.5", "--out", str(tmp_path / "out"), "-q"]) == 0
    config = artifact.read_config(tmp_path / "out")
    merged, rows = config["details"]["Merging"]["merged"], config["details"]["Experts"]
    assert merged["rule"] == "sum" and merged["scale"] == 0.5 and merged["largest rank"] == config["method_config"]["rank"] == 6
    assert [rows[i][key] for i in "12" for key in ("folder", "method", "concepts", "fit seed")] == [
        *("dagger", "random_lora", "dagger", 3),
        *("cat", "random_lora", "cat", 4),
    ]
    card = (tmp_path / "out/README.md").read_text()
    assert all(sha256(Path(folder) / CONFIG) in card for folder in two) and "| the first expert's, but for the rank |" in card


@pytest.mark.parametrize("trim", ["layer", "vector"])
def test_ties_has_the_papers_density_and_both_trims(
    trim: Any, two: list[str], tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--trim", "vector"] if trim == "vector" else []
    assert main(["merge", *two, "--model", base, "--rule", "ties", *options, "--out", str(tmp_path / "out"), "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert (said["density"], said["trim"]) == (0.2, trim)
    experts = [artifact.load_eraser(folder)[0].tensors() for folder in two]
    wanted, _ = merging.merge(experts, "ties", density=0.2, trim=trim)
    made = artifact.load_eraser(tmp_path / "out")[0].tensors()
    assert made.keys() == wanted.keys() and all(torch.equal(made[key], tensor) for key, tensor in wanted.items())


def test_quiet_draws_no_bars(two: list[str], tmp_path: Path, base: str, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["merge", *two, "--model", base, "--rule", "co-merge", "--out", str(tmp_path / "out")]
    assert main(command) == 0 and "20/20" in capfd.readouterr().err
    assert main([*command, "-q"]) == 0 and "20/20" not in capfd.readouterr().err
    assert main([*command, "--json"]) == 0 and "20/20" not in capfd.readouterr().err
