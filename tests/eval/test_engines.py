"""Several processes on one cell: the ranks of a launcher and the workers of a Ray cluster make every chunk once, and the same bytes."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import artifact
from erasure.cli.drawing import draw
from erasure.cli.main import main
from erasure.cli.options import Base
from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.eval.bench import BASE, Bench
from erasure.eval.engines.ranks import Rank, wait
from erasure.eval.generate import generate
from erasure.eval.protocol import Protocol
from erasure.eval.store import Cell, Settings
from erasure.eval.suite import Suite
from erasure.models import load_base
from erasure.registry import methods

CONCEPT = Concept("dagger", targets=("dagger", "knife"), anchors=("cat",))
TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a cell but its measurements of time and memory, which no two runs share."""
    kept = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("timing.json", "memory.json"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def bench(folder: Path, suite: Suite, limit: int) -> Bench:
    small = suite.under(steps=4).limited(limit)
    return Bench(folder, load_base("canvas", device="cpu"), "canvas", small, CONCEPT, batch_size=2, progress=False)


@pytest.fixture
def cell(tmp_path: Path, make_rows: Any, small_protocol: Protocol) -> Cell:
    rows = make_rows(37)
    return Cell.open(tmp_path / "cell", rows, Settings.of(rows, small_protocol, eraser="base", model="fake", batch_size=2))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Rank(0, 1, 0)),
        (TWO, Rank(1, 2, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(5, 8, 1)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}, Rank(3, 4, 3)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, Rank(1, 2, 0)),
    ],
)
def test_a_rank_is_read_from_what_launchers_set(environment: dict[str, str], expected: Rank) -> None:
    assert Rank.here(environment) == expected


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "1"}, {"WORLD_SIZE": "two"}])
def test_a_rank_that_cannot_be_is_an_error(environment: dict[str, str]) -> None:
    with pytest.raises(ErasureError, match=r"RANK|WORLD_SIZE|rank"):
        Rank.here(environment)


@pytest.mark.parametrize("shard", [(1, 1), (2, 3), (3, 3)])
@pytest.mark.parametrize("count", [1, 2, 3, 25])
def test_ranks_share_a_shard_without_rest_or_overlap(cell: Cell, shard: tuple[int, int], count: int) -> None:
    shares = [cell.missing(Rank(index, count).share(shard)) for index in range(count)]
    made = sorted(chunk.index for share in shares for chunk in share)
    assert made == [chunk.index for chunk in cell.missing(shard)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [Rank(i, 8, i % 4).device(asked) for i, asked in ((0, None), (6, None), (3, "cuda"), (6, "cuda:0"), (6, "cpu"))] == [
        "cuda:0",
        "cuda:2",
        "cuda:3",
        "cuda:0",
        "cpu",
    ]
    assert Rank().device(None) is None and Rank().device("cuda") == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert Rank(1, 2, 1).device(None) == "cpu"


def test_the_first_rank_waits_for_the_others_and_gives_up_on_the_dead(cell: Cell, small_protocol: Protocol, fake_pipe: Any) -> None:
    generate(fake_pipe(), cell, small_protocol, shard=Rank(0, 2).share(), progress=False)
    with pytest.raises(ErasureError, match=r"9 chunks are missing.*run the command again"):
        wait(cell, patience=0.05, every=0.01)
    late = threading.Timer(0.2, generate, (fake_pipe(), cell, small_protocol), {"shard": Rank(1, 2).share(), "progress": False})
    late.start()
    wait(cell, patience=10, every=0.01)
    assert not cell.missing()
    late.join()


@pytest.mark.parametrize("verb", ["erase", "bench", "export"])
def test_work_of_one_process_is_refused_under_a_launcher(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for key, value in TWO.items():
        monkeypatch.setenv(key, value)
    assert main([verb, "uce"]) == 2
    assert "run it without launcher" in " ".join(capsys.readouterr().err.split())


def test_two_ranks_of_accelerate_make_what_one_process_makes(tmp_path: Path, demo: Suite) -> None:
    """Rank 0 alone speaks; it goes on when all chunks are there."""
    ours = bench(tmp_path / "one", demo, 12).generate(BASE)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    asked = ["--model", "canvas", "--concept", "dagger", "--suite", "canvas-demo", "--limit", "12", "--steps", "4", "--batch-size", "2"]
    command = [*launch, "-m", "erasure", "generate", BASE, *asked, "--device", "cpu", "--out", str(tmp_path / "two"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(line)["missing"] for line in done.stdout.splitlines()] == [0]
    assert content(tmp_path / "two/images/base") == content(ours.folder) and len(ours.chunks) == 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of two CPUs on this machine: two workers of one thread."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'erasure-suite[ray]'")
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    yield ray
    ray.shutdown()


class Killer(logging.Handler):
    """Listens to the engine; once two workers are ready and one has made a chunk, it kills the other in the middle of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.ready: list[int] = []
        self.made: Counter[str] = Counter()
        self.killed: int | None = None
        self.lost: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if found := re.search(r"worker ready: .*, pid (\d+)", said):
            self.ready.append(int(found[1]))
        elif found := re.search(r"(chunk-\d+) (?:made by .*, pid (\d+)|was there)", said):
            self.made[found[1]] += 1
            if self.killed is None and found[2] and len(self.ready) == 2:
                self.killed = next(pid for pid in self.ready if pid != int(found[2]))
                os.kill(self.killed, signal.SIGKILL)
        elif found := re.search(r"worker was lost at (chunk-\d+)", said):
            self.lost.append(found[1])


@pytest.fixture
def killer() -> Iterator[Killer]:
    log, handler = logging.getLogger("erasure"), Killer()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.removeHandler(handler)
    log.setLevel(level)


def test_ray_with_a_worker_killed_in_the_middle_makes_what_one_process_makes(
    cluster: Any, killer: Killer, tmp_path: Path, demo: Suite
) -> None:
    one, many = bench(tmp_path / "one", demo, 40), bench(tmp_path / "many", demo, 40)
    eraser = methods.get("uce").from_config({}).fit(one.pipe, [CONCEPT])
    folder = str(artifact.save(eraser, tmp_path / "artefact", pipe=one.pipe, base_id="canvas"))
    base = Base(model="canvas", device="cpu")
    cell = draw(many, {"uce": eraser}, base, folder, "ray")["uce"]
    names = [chunk.folder for chunk in cell.chunks]
    assert killer.killed and len(killer.lost) == 1 and set(killer.lost) <= set(names)
    assert killer.made == Counter(names) and not cell.missing()
    cell.clean()  # of the draft that the killed worker may have begun
    assert content(cell.folder) == content(one.generate("uce", eraser).folder)
    changed = max(path.stat().st_mtime_ns for path in cell.folder.rglob("*"))
    draw(many, {"uce": eraser}, base, folder, "ray")
    assert killer.made == Counter(names) and max(path.stat().st_mtime_ns for path in cell.folder.rglob("*")) == changed


def test_what_a_ray_worker_raises_reaches_the_user(cluster: Any, tmp_path: Path, demo: Suite) -> None:
    """Here an artefact that is not on the workers' disk."""
    run = bench(tmp_path, demo, 5)
    eraser = methods.get("uce").from_config({}).fit(run.pipe, [CONCEPT])
    started = time.monotonic()
    with pytest.raises(ErasureError, match=r"a Ray worker on .* cannot start: .*nowhere"):
        draw(run, {"uce": eraser}, Base(model="canvas", device="cpu"), str(tmp_path / "nowhere"), "ray")
    assert time.monotonic() - started < 120 and run.cell("uce", eraser).missing()


def test_ray_is_no_part_of_all_and_its_absence_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo: Suite) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ErasureError, match=r"erasure-suite\[ray\]"):
        draw(bench(tmp_path, demo, 5), {BASE: None}, Base(model="canvas", device="cpu"), BASE, "ray")
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    whole = re.search(r"^all = (.*)$", text, re.MULTILINE)
    assert whole and "ray" not in whole[1]
