"""Files of detections: whole or absent, of one identity, and merged by cat."""

import dataclasses
import json

import pytest

from erasure.errors import ErasureError
from erasure.eval.detectors import Box, Detection, Record, detections_path, read_detections, write_detections


def record(row, score=0.5):
    return Record(row, False, Detection((Box("bright", score, (0.0, 1.0, 2.0, 3.0)),), {"bright": score}))


def test_round_trip_and_same_bytes(fixed, tmp_path):
    identity = fixed().identity()
    path = detections_path(tmp_path / "cell", identity)
    assert path.name == "detections-fixed.jsonl"
    written = write_detections(path, identity, iter([record("a"), Record("b", True, Detection())]))
    assert read_detections(path) == written
    first = path.read_bytes()
    write_detections(path, identity, written.records)
    assert path.read_bytes() == first and [p.name for p in path.parent.iterdir()] == [path.name]
    header = json.loads(first.splitlines()[0])
    assert header["schema"] == 1 and header["identity"]["sha256"] == "0" * 64


def test_a_failing_run_leaves_the_old_file(fixed, tmp_path):
    identity, path = fixed().identity(), tmp_path / "d.jsonl"
    write_detections(path, identity, [record("a")])

    def broken():
        yield record("a")
        raise ErasureError("stop")

    with pytest.raises(ErasureError, match="stop"):
        write_detections(path, identity, broken())
    assert [r.row for r in read_detections(path).records] == ["a"]


def test_identities_never_mix(fixed, tmp_path):
    identity = fixed().identity()
    other = dataclasses.replace(identity, sha256="1" * 64)
    assert identity.hash != other.hash
    one, two, both = (tmp_path / f"{name}.jsonl" for name in ("one", "two", "both"))
    write_detections(one, identity, [record("a")])
    with pytest.raises(ErasureError, match="sha256 = '1111"):
        write_detections(one, other, [record("b")])
    write_detections(two, identity, [record("b")])
    both.write_bytes(one.read_bytes() + two.read_bytes())  # shards, joined by cat
    assert [r.row for r in read_detections(both).records] == ["a", "b"]
    two.unlink()
    write_detections(two, other, [record("b")])
    both.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(ErasureError, match="line 3: detections of sha256"):
        read_detections(both)


def test_damage_is_an_error_with_its_line(fixed, tmp_path):
    identity, path = fixed().identity(), tmp_path / "d.jsonl"
    write_detections(path, identity, [record("a"), record("b")])
    whole = path.read_text()
    path.write_text(whole[:-20])
    with pytest.raises(ErasureError, match="line 3 is damaged"):
        read_detections(path)
    path.write_text("\n".join(whole.splitlines()[1:]))
    with pytest.raises(ErasureError, match="does not begin with a detector's identity"):
        read_detections(path)
    path.write_text(whole + whole.splitlines()[1] + "\n")
    with pytest.raises(ErasureError, match="row a comes twice"):
        read_detections(path)
    path.write_text(whole.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ErasureError, match="schema 2, this version reads 1"):
        read_detections(path)
    path.write_text("")
    with pytest.raises(ErasureError, match="is empty"):
        read_detections(path)
    with pytest.raises(ErasureError, match="no detections at"):
        read_detections(tmp_path / "none.jsonl")
    with pytest.raises(ErasureError, match="no records"):
        write_detections(tmp_path / "new.jsonl", identity, [])
    assert not (tmp_path / "new.jsonl").exists()
