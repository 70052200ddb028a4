"""`erasure erase` under a launcher: processes that train together leave one artefact, that of one process with as many micro-batches."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from erasure.artifact import CONFIG
from erasure.cli.main import main
from erasure.lora import LORA

FEW = "--steps 3 --images 2 --sampling-steps 2 --batch 1 --lr 0.01 --rank 2".split()
ON = ["--model", "canvas", "--device", "cpu", "--concept", "dagger", "--preset", "canvas", *FEW]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "erasure"]


def test_two_processes_write_the_artefact_of_one_with_two_micro_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*LAUNCH, "erase", "esd", *ON, "--out", str(tmp_path / "two"), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "destroy_process_group" not in done.stderr and "Error" not in done.stderr
    assert main(["erase", "esd", *ON, "--accumulation", "2", "--out", str(tmp_path / "one"), "--json"]) == 0
    one, two = json.loads(capsys.readouterr().out), json.loads(done.stdout)  # one process speaks
    assert two == json.loads((tmp_path / "two" / CONFIG).read_text()) and sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    assert same(one) == same(two) and one["method_config"].pop("accumulation") == 2 and two["method_config"].pop("accumulation") == 1
    assert one["method_config"] == two["method_config"]
    ours, theirs = (load_file(tmp_path / name / LORA) for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-6, rtol=1e-5)
    assert max(float(tensor.abs().max()) for name, tensor in ours.items() if "lora_B" in name) > 0.01  # which start at zero


def same(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration does not depend on the run or the last digits."""
    return {key: config[key] for key in ("schema", "kind", "method", "concepts", "base", "seed")} | {"files": config["files"].keys()}


@pytest.mark.parametrize("method", ["uce", "conceptprune", "ssd_diffusion"])
def test_a_fit_without_micro_batches_is_the_work_of_one_process(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    assert main(["erase", method, "--model", "canvas", "--concept", "dagger", "--out", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"`erasure erase {method}` is the work of one process, the launcher started 2: run it without launcher" in said
    assert not list(tmp_path.iterdir())
