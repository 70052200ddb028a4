"""Whatever is wrong with a command gives cause and fix, exit code 2, no traceback, and nothing written. One line a case."""

import errno
import functools
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from erasure import artifact, models
from erasure.cli.main import main

ON = "--model canvas --device cpu"
FEW = f"{ON} --suite canvas-demo --limit 5 --steps 1 --batch-size 5"
"""Five images of one step: as little as a suite can be."""
FIT = f"erase negative_prompt {ON} --concept dagger"
BENCH = f"bench {FEW} --out new"
SUITE = """
name: mine
version: 1
summary: mine
source: canvas
ranked: false
counts: {named: 1}
protocol: {scheduler: DDIMScheduler, steps: 1, guidance: 4.0, height: 64, width: 64, judge: canvas/judge_test}
"""

CASES = [
    # (command, what is wrong, what to do)
    ("bencg", "no command 'bencg'", "did you mean bench"),
    ("erase ucee --model canvas", "no method 'ucee'", "did you mean uce"),
    ("erase zzz", "no method 'zzz'", "Known: .*uce.*erasure methods"),
    (f"{BENCH} --concept dager --methods uce", "no canvas concept 'dager'", "did you mean dagger"),
    ("erase uce --model org/name --concept violance --out new", "no concept 'violance'", "did you mean violence.*--target"),
    (f"{BENCH} --concept dagger --methods uce,safre", "no method 'safre'", "did you mean safree"),
    (f"{BENCH} --concept dagger --methods ,", "--methods is empty", "see `erasure methods`"),
    (f"{BENCH} --concept dagger --methods uce,uce", "--methods has uce twice", "two runs"),
    (f"{BENCH} --concept dagger --methods gone.yaml", "no method file gone.yaml", "check the path"),
    (f"{BENCH} --concept dagger --methods nameless.yaml", "nameless.yaml does not say which method", "needs a key `method`"),
    (f"{BENCH} --concept dagger --methods typo.yaml", "uce: erase_scal", "erase_scale"),
    (f"{BENCH} --concept dagger --methods broken.yaml", r"broken.yaml is not YAML.*line \d", "correct it"),
    (f"{BENCH} --concept dagger --concept dagger --methods uce", "--concept dagger is given twice", "once is enough"),
    (f"bench {ON} --suite canvas-dem --concept dagger --methods uce --out new", "no suite 'canvas-dem'", "did you mean canvas-demo"),
    (f"bench {ON} --suite gone.yaml --concept dagger --methods uce --out new", "no suite file gone.yaml", "check the path"),
    (f"bench {ON} --suite lacking.yaml --concept dagger --methods uce --out new", "suite lacking.yaml: counts", "Field required"),
    (f"bench {ON} --suite typo-suite.yaml --concept dagger --methods uce --out new", "protocol.stepz: unknown key", "did you mean steps"),
    (f"bench {ON} --suite empty.yaml --concept dagger --methods uce --out new", "an empty suite", "at least 0, .* more"),
    (f"bench {ON} --suite nothing.yaml --concept dagger --methods uce --out new", "suite nothing.yaml: .*protocol", "Field required"),
    (f"bench {ON} --suite broken.yaml --concept dagger --methods uce --out new", "broken.yaml is not YAML", r"line \d"),
    (f"bench {ON} --suite latin.yaml --concept dagger --methods uce --out new", "latin.yaml is not YAML.*utf-8", "correct it"),
    (
        f"bench {ON} --suite judge.yaml --concept dagger --methods uce --out new",
        "no judge 'canvas/judge_tset'",
        "did you mean canvas/judge_test",
    ),
    (f"{BENCH} --target 'my bicycle' --methods uce", "no canvas concept 'my bicycle'", "suite of their own|suite of its own"),
    (f"bench {FEW} --out file --concept dagger --methods uce", "file is a file", "choose another folder"),
    (f"bench {FEW} --out file/below --concept dagger --methods uce", "file is a file", "choose another folder"),
    (f"{FIT} --out file", "file is a file", "choose another folder"),
    (f"{FIT} --out full", "full is not empty and holds no artefact", "choose another folder"),
    (f"erase safree {ON} --concept dagger --out ok", "ok holds an artefact of negative_prompt on dagger", "choose another --out"),
    (f"erase negative_prompt {ON} --concept bomb --out ok", "ok holds an artefact of negative_prompt on dagger", "remove that folder"),
    (f"generate base {FEW} --concept bomb --out run", "run/images/base holds images made with rows", "another concept.*use another folder"),
    (f"generate base {FEW.replace('steps 1', 'steps 2')} --concept dagger --out run", "made with protocol", "another suite, --steps"),
    (f"generate base {FEW.replace('size 5', 'size 4')} --concept dagger --out run", "batch_size = 5, not 4", "use another folder"),
    (f"generate ok {FEW} --out broken-run", "cell.json is not JSON", "remove .*broken-run"),
    (f"generate base {FEW} --concept dagger --out new --shard 5/4", "shard '5/4'", "i from 1 to n, such as 3/16"),
    (f"generate base {FEW} --concept dagger --out new --shard x", "shard 'x'", "write i/n"),
    (f"generate base {FEW} --out new", "the base has no concept of its own", "--concept"),
    (f"generate gone {FEW} --out new", "gone is no artefact", "a folder that `erasure erase` wrote"),
    (f"evaluate gone {FEW} --out new", "gone is no artefact", "a folder that `erasure erase` wrote"),
    (f"evaluate ok {FEW} --concept dagger --concept bomb --out new", "asks about one concept, not 2", "choose one with --concept"),
    (f"evaluate base-folder/base {FEW} --out new", "a folder called 'base'", "rename it"),
    (f"{FIT} --out new --batch 3", "Unknown option: --batch", "See `erasure erase negative_prompt --help`"),
    (f"erase uce {ON} --concept dagger --out new --erase-scal 2", "Unknown option: --erase-scal", "Did you mean --erase-scale"),
    (f"erase uce {ON} --concept dagger --out new --erase-scale much", 'unable to convert "much" into float', "--help"),
    (f"erase uce {ON} --concept dagger --out new --tokens lst", 'Invalid value "lst" for --tokens', 'Did you mean "last"'),
    (f"{FIT} --out new --seed -1", 'Invalid value "-1" for --seed', "Must be >= 0"),
    (f"bench {ON} --suite canvas --concept dagger --methods uce --out new --limit 0", 'Invalid value "0" for --limit', "Must be >= 1"),
    (f"bench {ON} --suite canvas --concept dagger --methods uce --out new --steps -3", 'Invalid value "-3" for --steps', "Must be >= 1"),
    (
        f"bench {ON} --suite canvas --concept dagger --methods uce --out new --guidance -1",
        "Invalid value .* for --guidance",
        "Must be >= 0",
    ),
    (f"bench {ON} --suite canvas --concept dagger --methods uce --out new --batch-size 0", "for --batch-size", "Must be >= 1"),
    (f"erase uce {ON} --out new", "nothing to erase", "--concept or --target"),
    (f"erase uce {ON} --anchor cake --out new", "--anchor and --retain belong to --target", "--target"),
    (f"erase uce {ON} --target ' ' --out new", "needs a name|a target is empty", "name|target"),
    (
        f"erase uce {ON} --target a --target b --target c --anchor x --anchor y --out new",
        "2 anchors for 3 targets",
        "give one, or one each",
    ),
    (f"erase uce {ON} --target bomb --retain cat --retain Bomb --out new", r"retain\[1\], 'Bomb', is a target too", "take it out"),
    (f"erase uce {ON} --target bomb --kind thing --out new", 'Invalid value "thing" for --kind', "Choose from: .*object"),
    (f"erase uce {ON} --concept typo-concept.yaml --out new", "typo-concept.yaml: target: unknown key", "did you mean targets"),
    (f"erase uce {ON} --concept both.yaml --out new", r"both.yaml: .*retain\[0\]", "take it out"),
    (f"erase uce {ON} --concept broken.yaml --out new", "broken.yaml is not YAML", "correct it"),
    (f"erase uce {ON} --concept gone.yaml --out new", "no concept file gone.yaml", "check the path"),
    ("erase uce --concept dagger --out new", "--model requires an argument", "See `erasure erase uce --help`"),
    ("erase uce --model canvsa --target bomb --out new", "no model 'canvsa'", "did you mean canvas.*hub id"),
    ("erase uce --model full --target bomb --out new", "full is no diffusers folder", "save_pretrained"),
    ("erase uce --model file --target bomb --out new", "file is a file of a kind that is not read", r"\.safetensors checkpoint"),
    ("erase uce --model old.ckpt --target bomb --out new", "old.ckpt is a pickle", "convert it to .safetensors"),
    ("erase uce --model gone.safetensors --target bomb --out new", "no checkpoint file gone.safetensors", "check the path"),
    ("erase uce --model bare.safetensors --target bomb --out new", "bare.safetensors holds weights alone", "--base-config"),
    ("erase uce --model bare.safetensors --base-config gone --target bomb --out new", "gone is no folder", "give a diffusers folder"),
    ("erase uce --model canvas --device abacus --target bomb --out new", "no device 'abacus' here", "try cpu"),
    ("erase uce --model canvas --device cuda:7 --target bomb --out new", "no device 'cuda:7' here", "leave --device out"),
    (f"erase uce {ON} --dtype int8 --target bomb --out new", 'Invalid value "int8" for --dtype', "Choose from: .*bfloat16"),
    ("suites shw", "no suites command 'shw'", "did you mean show"),
    ("suites show i2q", "no suite 'i2q'", "did you mean i2p"),
    ("suites fetch canvas --out new", "suite canvas has no files", "rows follow from the concept"),
    (f"generate base {ON} --suite i2p --prompts columns.csv --out new", "no column 'prompt'.* the columns of columns.csv", "Known: .*text"),
    (f"generate base {ON} --suite i2p --prompts header.csv --out new", "header.csv has no rows", "at least one prompt"),
    (f"generate base {ON} --suite i2p --prompts gone.csv --out new", "no prompts at gone.csv", "give the file"),
    ("export full --model canvas --format delta --out new", "full is no artefact", "a folder that `erasure erase` wrote"),
    ("export ok --model canvas --format dleta --out new", 'Invalid value "dleta" for --format', 'Did you mean "delta"'),
    (f"verify full {ON}", "full is no artefact", "a folder that `erasure erase` wrote"),
    (f"verify ok extra {ON}", "Unused Tokens: .*extra", "See `erasure verify --help`"),
    (f"verify other-family {ON}", "made for the family flux, this pipeline is sd1", "give its base"),
    (f"verify other-shapes {ON}", "unet has other layers or shapes", "give that, 'canvas', as --model"),
    (f"verify other-weights {ON}", "sampled weights of unet differ", "give that base"),
    ("compare", "nothing to compare", "two or more results.json"),
    ("compare good.json", "only good.json to compare", "two or more results.json"),
    ("compare good.json ./good.json", "good.json is given twice", "once is enough"),
    ("compare gone.json good.json", "no results at gone.json", "run `erasure evaluate`"),
    ("compare cut.json good.json", "cut.json is not JSON", "run `erasure evaluate` again"),
    ("compare list.json good.json", "list.json has schema None", "that `erasure evaluate` wrote"),
    ("compare newer.json good.json", "newer.json has schema 99", "upgrade"),
    ("compare lacking.json good.json", "lacking.json lacks .*destroyed", "run `erasure evaluate` again"),
    ("compare twice.json good.json", "twice.json is not JSON .the key 'n' is there twice", "run `erasure evaluate` again"),
    ("compare typed.json good.json", "typed.json n: Input should be a valid integer", "run `erasure evaluate` again"),
    ("compare short good.json", "samples.jsonl has 1 rows, the results.json beside it has 6", "evaluate again"),
    ("compare good.json --published gone", "no published rows at gone", "docs/published"),
    ("compare good.json --published nothing.yaml", "nothing.yaml: source: Field required", "columns"),
    ("compare damaged good.json", "samples.jsonl does not hold samples", "run `erasure evaluate` again"),
    ("compare good.json cut.json --format tabel", 'Invalid value "tabel" for --format', 'Did you mean "table"'),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every sort of file that the commands name, made once; a case that changes it fails."""
    desk = tmp_path_factory.mktemp("desk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        assert main(shlex.split(f"{FIT} --out ok -q")) == 0
        assert main(shlex.split(f"evaluate base {FEW} --concept dagger --out run -q")) == 0
    good = json.loads((desk / "run/results/base/results.json").read_text())
    texts = {
        "file": "",
        "full/notes.txt": "mine",
        "old.ckpt": "",
        "bare.safetensors": "",
        "broken.yaml": "name: [\n",
        "nothing.yaml": "",
        "nameless.yaml": "erase_scale: 2\n",
        "typo.yaml": "method: uce\nerase_scal: 2\n",
        "typo-concept.yaml": "name: bomb\ntarget: [bomb]\n",
        "both.yaml": "name: bomb\ntargets: [bomb, grenade]\nretain: [grenade]\n",
        "lacking.yaml": SUITE.replace("counts: {named: 1}", ""),
        "typo-suite.yaml": SUITE.replace("steps: 1", "steps: 1, stepz: 2"),
        "empty.yaml": SUITE.replace("named: 1", "named: 0"),
        "judge.yaml": SUITE.replace("judge_test", "judge_tset"),
        "good.json": json.dumps(good),
        "cut.json": json.dumps(good)[:-9],
        "list.json": "[]",
        "newer.json": json.dumps({**good, "schema": 99}),
        "lacking.json": json.dumps({key: value for key, value in good.items() if key != "destroyed"}),
        "twice.json": json.dumps(good)[:-1] + ', "n": 5}',
        "typed.json": json.dumps({**good, "n": "many"}),
        "short/results.json": json.dumps(good),
        "short/samples.jsonl": (desk / "run/results/base/samples.jsonl").read_text().splitlines()[0] + "\n",
        "damaged/results.json": json.dumps(good),
        "damaged/samples.jsonl": '{"id": "named-000"}\n',
        "broken-run/images/ok/cell.json": "{",
        "columns.csv": "case_number,text\n1,a dog\n",
        "header.csv": "case_number,prompt\n",
    }
    for name, text in texts.items():
        (desk / name).parent.mkdir(parents=True, exist_ok=True)
        (desk / name).write_text(text)
    (desk / "latin.yaml").write_bytes("name: Citroën\n".encode("latin-1"))
    shutil.copytree(desk / "ok", desk / "base-folder" / "base")
    edit(desk, "other-family", lambda config: config["base"].update(family="flux"))
    edit(desk, "other-shapes", lambda config: config["base"]["components"]["unet"].update(shapes="0" * 64))
    edit(desk, "other-weights", lambda config: config["base"]["components"]["unet"].update(entries=[9.0] * 256))
    return desk


def edit(desk: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """A copy of the artefact ``ok`` with a change to its configuration."""
    shutil.copytree(desk / "ok", desk / name)
    config = json.loads((desk / name / artifact.CONFIG).read_text())
    change(config)
    (desk / name / artifact.CONFIG).write_text(json.dumps(config))


@pytest.fixture(autouse=True)
def at_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run there, with the canvas loaded once; what was there before is there after, and nothing else."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr(models, "load_base", cached_base)
    before = contents(desk)
    yield
    assert contents(desk) == before


cached_base = functools.cache(models.load_base)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


def refused(capsys: pytest.CaptureFixture[str], command: str, cause: str, fix: str, code: int = 2) -> None:
    capsys.readouterr()
    assert main(shlex.split(command)) == code
    shown = capsys.readouterr()
    message = " ".join(shown.err.split())
    assert shown.out == "" and message.startswith("error: ") and "Traceback" not in message, shown
    assert re.search(cause, message), message
    assert re.search(fix, message), message


@pytest.mark.parametrize(("command", "cause", "fix"), CASES, ids=[command for command, _, _ in CASES])
def test_cause_and_fix(capsys: pytest.CaptureFixture[str], command: str, cause: str, fix: str) -> None:
    refused(capsys, command, cause, fix)


def test_there_are_many_cases() -> None:
    assert len(CASES) >= 40


def test_a_failed_check_exits_with_1(capsys: pytest.CaptureFixture[str], desk: Path) -> None:
    """No request would make it right: the artefact itself is not what was saved."""
    for name, sort in (("tampered", "README.md has sha256"), ("still", "canary 'dagger' moves by")):
        edit(
            desk,
            name,
            (lambda c: c["canary"].update(delta=9.9)) if name == "still" else (lambda c: c["files"].update({"README.md": "0" * 64})),
        )
        try:
            refused(capsys, f"verify {name} {ON}", sort, "the artefact", code=1)
        finally:
            shutil.rmtree(desk / name)


def test_no_space_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, desk: Path) -> None:
    """Python's error and that of safetensors, which has no errno; what was begun is gone, and an older artefact stays."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    def full_in_rust(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(artifact, "model_card", full)
    refused(capsys, f"{FIT} --out new", "somewhere: No space left on device", "free some space")
    refused(capsys, f"{FIT} --out ok", "somewhere: No space left on device", "free some space")
    monkeypatch.setattr(artifact, "save_file", full_in_rust)
    refused(capsys, f"erase uce {ON} --concept dagger --out new -q", "No space left on device", "free some space")


def test_no_space_left_for_images(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, desk: Path) -> None:
    from PIL import Image

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    try:
        refused(
            capsys, f"generate base {FEW} --concept dagger --out new -q", "No space left on device", "free some space.*goes on from here"
        )
        assert [p.name for p in (desk / "new").rglob("*") if p.is_file()] == ["cell.json"]  # no half chunk, no draft
    finally:
        shutil.rmtree(desk / "new", ignore_errors=True)


def test_permission(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "broken.yaml")

    monkeypatch.setattr(Path, "read_text", denied)
    refused(capsys, f"{FIT} --concept nothing.yaml --out new", "broken.yaml: Permission denied", "permissions")


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "full", "--model", "canvas", "--json"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    error = json.loads(shown.err)
    assert error["exit_code"] == 2 and error["error"].startswith("full is no artefact")
    assert main(["compare", "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"].startswith("nothing to compare")


def test_brackets_in_a_message_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, f"verify '[/red][bold]x' {ON}", r"\[/red\]\[bold\]x is no artefact", "give a folder")


def test_ctrl_c_exits_with_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "load_eraser", interrupted)
    refused(capsys, f"verify ok {ON}", "stopped", "the same command goes on", code=130)


def test_a_bug_keeps_its_traceback_and_says_where_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "load_eraser", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        main(shlex.split(f"verify ok {ON}"))
    assert "issue tracker" in " ".join(caught.value.__notes__)


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr(artifact, "load_eraser", missing)
    refused(capsys, f"verify ok {ON}", "package scipy is not installed", r"pip install 'erasure-suite\[all\]'")
