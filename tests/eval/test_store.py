import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from erasure.errors import ErasureError
from erasure.eval import store
from erasure.eval.generate import draw, estimate, generate, seconds_per_image, under
from erasure.eval.protocol import Protocol
from erasure.eval.rows import Row
from erasure.eval.store import Cell, Settings, StoreMismatch, parse_shard


@pytest.fixture
def rows(make_rows: Any) -> list[Row]:
    return make_rows(11)


@pytest.fixture
def settings(rows: list[Row], small_protocol: Protocol) -> Settings:
    return Settings.of(rows, small_protocol, eraser="base", model="fake", batch_size=3)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a cell but the timings, which no two runs share."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "timing.json"}


def test_a_run_killed_at_any_chunk_resumes_to_the_same_bytes_and_makes_nothing_twice(
    tmp_path: Path, rows: list[Row], settings: Settings, small_protocol: Protocol, fake_pipe: Any
) -> None:
    whole = Cell.open(tmp_path / "whole", rows, settings)
    generate(fake_pipe(), whole, small_protocol, progress=False)
    for calls in ([1], [2, 1], [3], [4], [1, 1, 2]):
        folder, drawn = tmp_path / "-".join(map(str, calls)), list[int]()
        for fail_at in [*calls, None]:
            pipe, cell = fake_pipe(fail_at), Cell.open(folder, rows, settings)
            try:
                generate(pipe, cell, small_protocol, progress=False)
            except KeyboardInterrupt:
                assert cell.missing()
            drawn += pipe.drawn
        assert sorted(drawn) == [row.seed for row in rows]
        assert content(folder) == content(tmp_path / "whole") and not list(folder.glob(".*"))


def test_a_killed_process_leaves_no_half_chunk_and_its_draft_is_cleaned(
    tmp_path: Path, rows: list[Row], settings: Settings, small_protocol: Protocol, fake_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies between two images of a chunk, without any clean-up of its own."""
    cell = Cell.open(tmp_path, rows, settings)
    with monkeypatch.context() as patched:
        save = store._save
        patched.setattr(store, "_save", lambda path, image: os._exit(9) if path.stem == "named-001" else save(path, image))
        child = os.fork()
        if child == 0:
            cell.write(cell.chunks[0], torch.rand(3, 3, 16, 16), 1.0)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [p.name for p in tmp_path.glob(".chunk-0000+*/*")] == ["named-000.png"] and len(cell.missing()) == 4
    generate(fake_pipe(), cell, small_protocol, progress=False)
    assert not list(tmp_path.glob(".*")) and not cell.missing()


def test_drafts_of_living_processes_stay(tmp_path: Path, rows: list[Row], settings: Settings) -> None:
    cell = Cell.open(tmp_path, rows, settings)
    alive = tmp_path / f".chunk-0002+{platform.node()}+{os.getpid()}"
    elsewhere = tmp_path / ".chunk-0003+another-machine+1"
    alive.mkdir()
    elsewhere.mkdir()
    cell.clean()
    assert alive.is_dir() and elsewhere.is_dir()


def test_images_come_back_in_the_order_asked_for_and_within_rounding(
    tmp_path: Path, rows: list[Row], settings: Settings, small_protocol: Protocol, fake_pipe: Any
) -> None:
    cell = Cell.open(tmp_path, rows, settings)
    generate(fake_pipe(), cell, small_protocol, progress=False)
    some = [rows[7], rows[0]]
    expected = torch.stack([torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(row.seed)) for row in some])
    assert (cell.images(some) - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert cell.images().shape == (11, 3, 16, 16)


def test_shards_make_every_chunk_once_between_them(
    tmp_path: Path, rows: list[Row], settings: Settings, small_protocol: Protocol, fake_pipe: Any
) -> None:
    whole, pipes = Cell.open(tmp_path / "whole", rows, settings), [fake_pipe() for _ in range(3)]
    generate(fake_pipe(), whole, small_protocol, progress=False)
    for part, pipe in enumerate(pipes, start=1):
        generate(pipe, Cell.open(tmp_path / "parts", rows, settings), small_protocol, shard=(part, 3), progress=False)
    assert sorted(seed for pipe in pipes for seed in pipe.drawn) == [row.seed for row in rows]
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0"])
def test_a_shard_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ErasureError, match="i/n"):
        parse_shard(text)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"batch_size": 4}, "batch_size"),
        ({"eraser": "abc"}, "eraser"),
        ({"protocol": "0" * 16}, "protocol"),
        ({"threads": 99}, "threads"),
        ({"versions": {"torch": "1.0"}}, "versions"),
    ],
)
def test_a_cell_made_otherwise_is_refused_by_the_name_of_the_setting(
    tmp_path: Path, rows: list[Row], settings: Settings, change: dict[str, Any], field: str
) -> None:
    Cell.open(tmp_path, rows, settings)
    with pytest.raises(StoreMismatch, match=field) as caught:
        Cell.open(tmp_path, rows, replace(settings, **change))
    assert caught.value.field.startswith(field)
    Cell.open(tmp_path, rows, settings)


def test_chunks_hold_rows_of_one_guidance_and_size_and_the_cell_keeps_the_suites_order(
    tmp_path: Path, rows: list[Row], small_protocol: Protocol, fake_pipe: Any
) -> None:
    own = [(None, None), (9.0, None), (9.0, 24)]
    mixed = [replace(row, guidance=own[i % 3][0], height=own[i % 3][1]) for i, row in enumerate(rows)]
    cell = Cell.open(tmp_path, mixed, Settings.of(mixed, small_protocol, eraser="base", model="fake", batch_size=3))
    assert [[row.id[-3:] for row in chunk.rows] for chunk in cell.chunks] == [
        ["000", "003", "006"],
        ["009"],
        ["001", "004", "007"],
        ["010"],
        ["002", "005", "008"],
    ]
    pipe = fake_pipe()
    generate(pipe, cell, small_protocol, progress=False)
    assert sorted(pipe.drawn) == [row.seed for row in rows] and pipe.guidances == [4.0, 4.0, 9.0, 9.0, 9.0]
    seen = list(cell.each())
    assert [row for row, _ in seen] == mixed == list(cell.rows)
    assert [tuple(image.shape) for _, image in seen[:3]] == [(3, 16, 16), (3, 16, 16), (3, 24, 16)]
    for row, image in seen:  # by its seed and size alone, whatever chunk it was in
        expected = torch.rand(3, row.height or 16, 16, generator=torch.Generator().manual_seed(row.seed))
        assert torch.equal(image, (expected * 255).round() / 255)
    assert cell.images([r for r in mixed if r.height]).shape == (3, 3, 24, 16)
    with pytest.raises(ErasureError, match=r"several sizes \(16x16, 24x16\).*each\(\)"):
        cell.images()


def test_rows_that_differ_are_never_drawn_by_one_call(rows: list[Row], small_protocol: Protocol, fake_pipe: Any) -> None:
    pipe = fake_pipe()
    with under(pipe, small_protocol), pytest.raises(ErasureError, match="2 settings"):
        draw(pipe, [rows[0], replace(rows[1], guidance=1.0)], small_protocol)
    assert not pipe.drawn


def test_a_video_is_stored_as_its_frames_below_each_other(tmp_path: Path, rows: list[Row], small_protocol: Protocol) -> None:
    class Films:
        dtype, scheduler = torch.float32, SimpleNamespace()

        def set_progress_bar_config(self, **_: Any) -> None: ...

        def __call__(self, *, num_frames: int, prompt: list[str], height: int, width: int, **_: Any) -> SimpleNamespace:
            grey = torch.arange(1, num_frames + 1) / 10  # frame k is k tenths bright
            return SimpleNamespace(frames=grey[None, :, None, None, None].expand(len(prompt), -1, 3, height, width))

    films = small_protocol.changed(frames=4)
    assert films.image_hash != small_protocol.image_hash
    cell = Cell.open(tmp_path, rows[:2], Settings.of(rows[:2], films, eraser="base", model="fake", batch_size=2))
    generate(Films(), cell, films, progress=False)
    film = cell.images()
    assert film.shape == (2, 3, 64, 16)
    assert [round(float(x), 1) for x in film.unflatten(2, (4, 16))[1].mean((0, 2, 3))] == [0.1, 0.2, 0.3, 0.4]


def test_other_prompts_in_one_cell_are_refused(tmp_path: Path, rows: list[Row], settings: Settings, small_protocol: Protocol) -> None:
    Cell.open(tmp_path, rows, settings)
    others = [*rows[:-1], replace(rows[-1], prompt="something else")]
    with pytest.raises(StoreMismatch, match="rows"):
        Cell.open(tmp_path, others, Settings.of(others, small_protocol, eraser="base", model="fake", batch_size=3))


def test_missing_and_damaged_images_are_errors(
    tmp_path: Path, rows: list[Row], settings: Settings, small_protocol: Protocol, fake_pipe: Any
) -> None:
    cell = Cell.open(tmp_path, rows, settings)
    with pytest.raises(ErasureError, match="not complete"):
        cell.images()
    generate(fake_pipe(), cell, small_protocol, progress=False)
    (tmp_path / "chunk-0001" / "named-004.png").write_bytes(b"")
    with pytest.raises(ErasureError, match=r"named-004.png is missing or damaged"):
        cell.images()
    with pytest.raises(ErasureError, match="no rows"):
        cell.images([])


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "NaN"), (0.0, "black")])
def test_broken_images_are_never_kept(
    tmp_path: Path, rows: list[Row], settings: Settings, small_protocol: Protocol, fake_pipe: Any, value: float, word: str
) -> None:
    cell = Cell.open(tmp_path, rows, settings)
    with pytest.raises(ErasureError, match=f"{word}.*named-002"):
        generate(fake_pipe(spoil=value), cell, small_protocol, progress=False)
    assert len(cell.missing()) == 4 and not list(tmp_path.rglob("*.png"))


def test_the_pipeline_is_left_as_it_was_found_even_after_an_error(
    tmp_path: Path, rows: list[Row], settings: Settings, small_protocol: Protocol, fake_pipe: Any
) -> None:
    pipe = fake_pipe(fail_at=2)
    scheduler, checker, attached = pipe.scheduler, pipe.safety_checker, list[Any]()

    @contextmanager
    def attach(to: Any) -> Iterator[None]:
        attached.append(to)
        assert to.scheduler is not scheduler
        try:
            yield
        finally:
            attached.append("detached")

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, Cell.open(tmp_path, rows, settings), small_protocol, attach=attach, progress=False)
    assert pipe.scheduler is scheduler and pipe.safety_checker is checker and pipe._progress_bar_config == {}
    assert attached == [pipe, "detached"]


def test_another_dtype_than_the_protocol_asks_for_is_refused(small_protocol: Protocol, fake_pipe: Any) -> None:
    pipe = fake_pipe()
    pipe.dtype = torch.float16
    with pytest.raises(ErasureError, match="--dtype float32"), under(pipe, small_protocol):
        pass


def test_a_scheduler_of_another_class_keeps_the_noise_schedule_and_what_the_pipeline_patched(
    small_protocol: Protocol, fake_pipe: Any
) -> None:
    from diffusers import DDIMScheduler

    pipe = fake_pipe()
    pipe.scheduler = DDIMScheduler(prediction_type="v_prediction", beta_end=0.02)
    pipe.scheduler.register_to_config(steps_offset=1)
    with under(pipe, small_protocol.changed(scheduler="EulerDiscreteScheduler", scheduler_config={"timestep_spacing": "trailing"})):
        config = pipe.scheduler.config
        assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
        assert (config.prediction_type, config.steps_offset, config.timestep_spacing) == ("v_prediction", 1, "trailing")
    for wrong in ({"scheduler": "NoScheduler"}, {"scheduler": "DDIMScheduler", "scheduler_config": {"spacing": "trailing"}}):
        with pytest.raises(ErasureError, match=r"NoScheduler|no setting spacing"), under(pipe, small_protocol.changed(**wrong)):
            pass


def test_timings_are_kept_and_an_estimate_follows_from_them(
    tmp_path: Path, rows: list[Row], settings: Settings, small_protocol: Protocol, fake_pipe: Any
) -> None:
    cell = Cell.open(tmp_path, rows, settings)
    assert cell.seconds_per_image() is None
    for chunk, seconds in zip(cell.chunks, [3.0, 6.0, 9.0, 4.0], strict=True):
        cell.write(chunk, torch.rand(len(chunk.rows), 3, 16, 16), seconds)
    assert cell.seconds_per_image() == pytest.approx(2.0)
    plan = estimate(400, 1.5, small_protocol)
    assert (plan.images, plan.minutes) == (400, 10) and plan.megabytes == pytest.approx(400 * 16 * 16 * 3 / 1e6)
    assert 0 < seconds_per_image(fake_pipe(), rows[:2], small_protocol) < 1


def test_a_chunk_records_rows_seeds_and_hashes(
    tmp_path: Path, rows: list[Row], settings: Settings, small_protocol: Protocol, fake_pipe: Any
) -> None:
    generate(fake_pipe(), Cell.open(tmp_path, rows, settings), small_protocol, progress=False)
    record = json.loads((tmp_path / "chunk-0003" / "chunk.json").read_text())
    assert record["rows"] == ["named-009", "named-010"] and record["seeds"] == [1009, 1010] and len(record["sha256"]) == 2


def test_a_scheduler_for_another_sort_of_model_is_refused_and_shipped_means_its_own(small_protocol: Protocol, fake_pipe: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = fake_pipe()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ddim = small_protocol.changed(scheduler="DDIMScheduler")
    with pytest.raises(ErasureError, match=r"DDIMScheduler does not fit this model.*block flow"), under(pipe, ddim):
        pass
    with under(pipe, small_protocol.changed(scheduler="shipped", scheduler_config={"shift": 5.0})):
        assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler and pipe.scheduler.config.shift == 5.0
