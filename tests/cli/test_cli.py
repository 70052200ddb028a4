"""The command line end to end on the canvas: exit codes, messages, one bench from nothing to report, resumed byte for byte."""

import json
import shutil

import pytest

from erasure import registry
from erasure.cli.main import main

FEW = ["--model", "canvas", "--suite", "canvas-demo", "--limit", "8", "--steps", "4", "--device", "cpu"]


def test_listings_print_json(capsys):
    assert main(["methods", "--json"]) == 0
    methods = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"negative_prompt", "uce", "safree"} <= methods.keys()
    assert methods["uce"]["kind"] == "weights" and "sd1" in methods["uce"]["families"]
    assert methods["uce"]["measured"]["canvas"]["named"]["rate"] < 0.2 < methods["negative_prompt"]["measured"]["canvas"]["named"]["rate"]
    assert main(["concepts", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sum(row["split"] == "test" for row in rows) == 8
    assert {"nudity", "violence", "van-gogh"} <= {row["concept"] for row in rows}
    assert main(["suites", "--json"]) == 0
    images = {row["suite"]: row["images"] for row in json.loads(capsys.readouterr().out)}
    assert images.items() >= {"canvas": 400, "canvas-demo": 72, "i2p": 4109, "coco-30k": 30000, "neighbours": None}.items()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_listing_has_every_name_in_full_and_is_a_line_a_record_where_it_is_piped(terminal, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")  # no colours, 80 columns
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(registry.methods.builtin) <= {line.split(" ")[0] for line in lines}
    assert max(map(len, (line.rstrip() for line in lines))) <= 80 if terminal else len(lines) == 1 + len(registry.methods.names())


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
    assert main([*command[:-2], "--batch-size", "8"]) == 2  # the store was made with another batch size
    assert "batch_size" in capsys.readouterr().err


def test_dry_run_makes_nothing(capsys, tmp_path):
    out = tmp_path / "run"
    assert main(["bench", *FEW, "--concept", "dagger", "--methods", "uce", "--out", str(out), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["images"] == 2 * len_rows() and plan["minutes"] >= 0
    assert not out.exists()


def len_rows() -> int:
    from erasure.eval.suite import load_suite

    return sum(load_suite("canvas-demo").limited(8).counts.values())


def test_dry_run_of_an_evaluation_and_of_a_fit(capsys, tmp_path):
    out = tmp_path / "run"
    assert main(["evaluate", "base", *FEW, "--concept", "dagger", "--out", str(out), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == len_rows()
    assert main(["erase", "uce", "--model", "canvas", "--concept", "dagger", "--out", str(out), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["concepts"][0]["name"] == "dagger"
    assert not out.exists()


def test_generate_prints_json_and_quiet_is_quiet(capsys, tmp_path):
    command = ["generate", "base", *FEW, "--concept", "dagger", "--batch-size", "4", "--out", str(tmp_path / "run")]
    assert main([*command, "--shard", "1/2", "--json"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["images"] == len_rows() and 0 < report["missing"] < len_rows() and shown.err == ""
    assert main([*command, "--quiet"]) == 0
    shown = capsys.readouterr()
    assert "0 still missing" in shown.out and shown.err == ""
    assert main([*command[:-1], str(tmp_path / "other"), "-v"]) == 0
    assert "chunks made" in " ".join(capsys.readouterr().err.split())
