"""Fits that cannot come to anything, from the command line: cause and fix, exit code, and no artefact."""

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from erasure import artifact, models
from erasure.cli.main import main

ON = "--model canvas --device cpu --concept dagger --out new -q"
QUICK = f"{ON} --preset canvas --images 1 --batch 1 --sampling-steps 2 --retain-scale 0"

CASES = [
    # (command, what is wrong, what to do)
    (f"erase esd {ON} --layers attn2.to_kk", "no layer 'attn2.to_kk' in its denoiser", "did you mean attn2.to_k"),
    (f"erase esd {ON} --rank 4 --layers attn2.to_kk", "no layer 'attn2.to_kk' in its denoiser", "did you mean attn2.to_k"),
    (f"erase gs_lora {ON} --layers ff.net.9", "no layer 'ff.net.9' in its denoiser", "did you mean ff.net.2"),
    (f"erase adv_unlearn {ON} --layers attn2", "no layer 'attn2' among those that text trains", "text_encoder"),
    (
        f"erase safety_dpo {QUICK.replace('--concept', '--target')} --anchor 'the dagger' --steps 1",
        "no usable pair: 0 of 1 pairs kept; .* 1 have it with the anchor's prompt too",
        "take another anchor, detector",
    ),
    (f"erase minimalist {ON} --budget 1.5", "budget is 1.5", "between 0 and 1"),
    (f"erase minimalist {ON} --budget 0", "budget is 0", "between 0 and 1"),
    (f"erase conceptprune {ON} --ratio 0", "ratio is 0.0", "such as 0.02"),
    (f"erase ssd_diffusion {ON} --share 0", "share 0.0", "a share above 0"),
    (f"erase salun {ON} --keep 0", "keep is 0", "such as 0.5"),
    ("erase esd --model canvas --target bomb --retain 'BOMB ' --out new", r"retain\[0\], 'BOMB ', is a target too", "take it out"),
]
cached_base = functools.cache(models.load_base)


@pytest.fixture(autouse=True)
def at_desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_base", cached_base)
    yield


def refused(capsys: pytest.CaptureFixture[str], command: str, cause: str, fix: str, code: int = 2) -> None:
    capsys.readouterr()
    assert main(shlex.split(command)) == code
    message = " ".join(capsys.readouterr().err.split())
    assert message.startswith("error: ") and re.search(cause, message) and re.search(fix, message), message


@pytest.mark.parametrize(("command", "cause", "fix"), CASES, ids=[command for command, _, _ in CASES])
def test_cause_and_fix(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, cause: str, fix: str) -> None:
    refused(capsys, command, cause, fix)
    assert not [place for place in tmp_path.iterdir() if place.name == "new" or not place.name.startswith(".")]


def test_a_fit_that_diverges_stops_with_1_and_saves_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = f"erase esd {QUICK} --steps 9 --lr 1e30"
    refused(capsys, command, r"training diverged at step \d of 9, with a ", r"try a smaller lr than 1e\+30", code=1)
    assert not (tmp_path / "new").exists()


def test_a_killed_fit_goes_on_with_its_own_settings_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = f"erase esd {QUICK} --part x --lr 1e-4"
    command = f"{begun} --steps 2"

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "save", killed)
        assert main(shlex.split(command)) == 130
    state = {p.name: p.read_bytes() for p in (tmp_path / ".new.training").iterdir()}
    assert state
    for other, said in (
        (f"erase esd {QUICK} --part x --lr 0.5 --steps 2", r"lr was 0\.0001, is 0\.5"),
        (f"{command} --eta 2", r"eta was 1\.0, is 2\.0"),
        (f"{begun} --steps 3", "steps was 2, is 3"),
    ):
        refused(capsys, other, said, "remove")
    assert {p.name: p.read_bytes() for p in (tmp_path / ".new.training").iterdir()} == state
    assert main(shlex.split(command)) == 0 and (tmp_path / "new" / artifact.CONFIG).is_file()
    assert not (tmp_path / ".new.training").exists()
