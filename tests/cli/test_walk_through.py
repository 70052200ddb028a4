"""The walk-through on a real model, without the model: what README shows, as ``--dry-run`` foretells it."""

import json
import socket
from pathlib import Path

import pytest

from erasure.cli.main import main
from erasure.eval import recipes as recipe_module
from erasure.eval import weights
from erasure.eval.detectors import missing

SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.mark.parametrize(
    ("suite", "images", "rows", "hashes"),
    [
        ("i2p", 4109, "rows of our sample", {"6c1821aeeb20beb276b4e20ce4c4b801f9106dc935bafc9f6fd5e12aa2651e6f"}),
        (
            "coco-30k",
            30000,
            "rows of our sample",
            {
                "87a3f463164120ca2d1efdbc251f443c7b0043214f767cd1852419d295db9ab5",
                "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
                "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
            },
        ),
    ],
)
def test_a_dry_run_of_the_real_model_needs_nothing_and_fetches_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    suite: str,
    images: int,
    rows: str,
    hashes: set[str],
) -> None:
    monkeypatch.setattr(weights, "_search", lambda weight: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(recipe_module, "missing", lambda name: "" if name in ("nudenet", "opennsfw") else missing(name))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a dry run went to the network"))
    command = ["evaluate", "out/van-gogh", "--model", SD, "--suite", suite, "--out", str(tmp_path / "out"), "--dry-run"]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["suite"] == suite and plan["images"] == images and rows in plan["read"] and plan["model"] == SD
    assert hashes <= {file["sha256"] for file in plan["downloads"]}
    assert any(file["source"] == f"hub {SD}" for file in plan["downloads"])
    if suite == "i2p":
        assert plan["recipes"]["mace"].startswith("ready (nudenet") and plan["recipes"]["q16"].startswith("unavailable: needs prompts.p")
    else:
        assert plan["metrics"] == ["fid", "kid", "cmmd", "clip_score"]
        assert sum(file["file"].startswith("weights-inception") for file in plan["downloads"]) == 1
    assert main([*command, "-q"]) == 0
    assert "downloads: " in capsys.readouterr().out and not (tmp_path / "out").exists()
