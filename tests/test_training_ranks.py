"""The training loop on several processes: as one with as many micro-batches, and agreed on where it ends."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure.callbacks import Callback, Validate
from erasure.errors import ErasureError
from erasure.training import Training
from tests.test_training import Toy, equal

RANK = """
import os
import sys
from pathlib import Path
import torch
from tests.test_training_ranks import as_a_rank
torch.save(as_a_rank(int(os.environ["RANK"]), Path(sys.argv[1])), Path(sys.argv[1]) / (os.environ["RANK"] + ".pt"))
torch.distributed.destroy_process_group()
threads = [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name], threads  # one that outlives the interpreter aborts it now and then
"""


class Halt(Callback):
    """Stops one process after three steps."""

    def __init__(self, here: bool) -> None:
        self.here = here

    def step(self, run: Training) -> None:
        if self.here and run.step == 3:
            run.stop = "enough"


def as_a_rank(rank: int, folder: Path) -> dict[str, Any]:
    """What one of two processes ends with, case by case: its weights, its losses, and why it stopped or what it raised."""

    def ends(**options: Any) -> Any:
        toy = Toy()
        try:
            log = toy.train(**{"steps": 4, **options})
        except ErasureError as error:
            return str(error)
        return toy.weights(), list(log.losses), log.stop

    values = iter([[3.0, 2.0, 2.01], [3.0, 2.0, 1.99]][rank])
    return {
        "plain": ends(),
        "goal": ends(steps=6, callbacks=[Validate(lambda: 0.05 + rank * 1e-4, every=2, goal=0.05)]),
        "best": ends(steps=6, callbacks=[Validate(lambda: next(values), every=2)]),
        "halt": ends(steps=6, callbacks=[Halt(rank == 1)]),
        "saved": ends(checkpoint=folder / f"own-{rank}"),
        "not seen by both": ends(checkpoint=folder / f"own-{rank}"),
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes of one launch end with."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder)],
            cwd=Path(__file__).parent.parent,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_train_as_one_with_two_micro_batches(both: list[dict[str, Any]]) -> None:
    (first, losses, _), (second, _, _) = (ended["plain"] for ended in both)
    one = Toy()
    log = one.train(steps=4, accumulation=2)
    assert equal(first, second) and losses == pytest.approx(log.losses, rel=1e-5)
    for ours, theirs in zip(one.weights(), first, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("case", "steps", "said"), [("goal", 2, "reached 0.05 at step 2, as asked"), ("best", 6, ""), ("halt", 3, "enough")]
)
def test_two_processes_that_measure_differently_stop_and_end_alike(both: list[dict[str, Any]], case: str, steps: int, said: str) -> None:
    (first, losses, stop), (second, _, other) = (ended[case] for ended in both)
    assert len(losses) == steps and stop == other == said and equal(first, second)


def test_processes_that_do_not_see_the_same_state_are_told(both: list[dict[str, Any]]) -> None:
    for ended in both:
        assert "the processes found states of steps 4, 0: give a folder that all of them see" in ended["not seen by both"]
