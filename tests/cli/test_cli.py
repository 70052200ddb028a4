"""The command line end to end on the canvas: exit codes, messages, one bench from nothing to report, resumed byte for byte."""

import json
import shutil

import pytest

from erasure.cli.main import main

FEW = ["--model", "canvas", "--suite", "canvas-demo", "--limit", "8", "--steps", "4", "--device", "cpu"]


def test_usage_errors_exit_with_2_and_failures_with_1(capsys, tmp_path):
    assert main(["erase", "uce", "--model", "canvas", "--out", "x", "--erase-scal", "2"]) == 2
    assert "erase-scale" in capsys.readouterr().err
    assert main(["bench", *FEW, "--concept", "dager", "--methods", "uce", "--out", str(tmp_path)]) == 1
    assert "did you mean dagger" in " ".join(capsys.readouterr().err.split())
    assert main(["bench", *FEW, "--concept", "dagger", "--methods", "ucee", "--out", str(tmp_path)]) == 1
    assert "uce" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "nothing"), "--model", "canvas"]) == 1
    assert "erasure_config.json" in capsys.readouterr().err
    assert main(["erase", "uce", "--model", "canvas", "--out", "x"]) == 1
    assert "--concept or --target" in capsys.readouterr().err


def test_listings_print_json(capsys):
    assert main(["methods", "--json"]) == 0
    assert {"negative_prompt", "uce", "safree"} <= {row["method"] for row in json.loads(capsys.readouterr().out)}
    assert main(["concepts", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sum(row["split"] == "test" for row in rows) == 8
    assert {"nudity", "violence", "van-gogh"} <= {row["concept"] for row in rows}
    assert main(["suites", "--json"]) == 0
    assert {row["suite"]: row["images"] for row in json.loads(capsys.readouterr().out)} == {"canvas": 400, "canvas-demo": 72}


def test_erase_then_verify_then_damage(capsys, tmp_path):
    folder = tmp_path / "bomb"
    own = ["--model", "canvas", "--device", "cpu", "--target", "bomb", "--retain", "cat"]
    assert main(["erase", "uce", *own, "--out", str(folder), "--erase-scale", "2", "--json"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["method_config"]["erase_scale"] == 2.0
    assert config["concepts"][0]["targets"] == ["bomb"] and config["concepts"][0]["retain"] == ["cat"]
    assert main(["verify", str(folder), "--model", "canvas", "--device", "cpu"]) == 0
    state = folder / "erasure_state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    capsys.readouterr()
    assert main(["verify", str(folder), "--model", "canvas", "--device", "cpu"]) == 1
    assert "sha256" in capsys.readouterr().err


def test_bench_makes_everything_and_resumes_byte_for_byte(capsys, tmp_path):
    out = tmp_path / "run"
    command = ["bench", *FEW, "--concept", "dagger", "--methods", "negative_prompt,uce,safree", "--out", str(out), "--batch-size", "4"]
    assert main([*command, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in table["rows"]] == ["base", "negative_prompt", "uce", "safree"]
    for name in (
        "table.md",
        "table.csv",
        "compare.json",
        "report.html",
        "grid.png",
        "results/uce/samples.jsonl",
        "artefacts/safree/README.md",
    ):
        assert (out / name).stat().st_size > 0, name
    samples = (out / "results/uce/samples.jsonl").read_bytes()
    chunk = next((out / "images/uce").glob("chunk-*"))
    kept = {p: p.stat().st_mtime_ns for p in (out / "images").rglob("*.png") if chunk not in p.parents}
    shutil.rmtree(chunk)
    assert main([*command, "--json"]) == 0
    assert (out / "results/uce/samples.jsonl").read_bytes() == samples
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # nothing was made twice
    capsys.readouterr()
    assert main(["compare", *(str(p) for p in sorted((out / "results").iterdir())), "--format", "markdown"]) == 0
    assert "negative_prompt" in capsys.readouterr().out
    assert main([*command[:-2], "--batch-size", "8"]) == 1  # the store was made with another batch size
    assert "batch_size" in capsys.readouterr().err


def test_dry_run_makes_nothing(capsys, tmp_path):
    out = tmp_path / "run"
    assert main(["bench", *FEW, "--concept", "dagger", "--methods", "uce", "--out", str(out), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["images"] == 2 * len_rows() and plan["minutes"] >= 0
    assert not out.exists()


def len_rows() -> int:
    from erasure.eval.suite import load_suite

    return load_suite("canvas-demo").limited(8).size


@pytest.mark.parametrize("verb", ["methods", "erase", "verify", "generate", "evaluate", "compare", "bench"])
def test_help_of_every_verb(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 5
