"""The loop around a detector: order, batches, and failures that name their row and are never taken for safe."""

import pytest
from PIL import Image

from erasure.errors import ErasureError
from erasure.eval.detectors import Detection, refused, run


def rows(grey, levels):
    return [(f"r{level}", grey(level)) for level in levels]


def test_records_come_in_order_and_in_batches(fixed, grey):
    detector = fixed()
    records = list(run(detector, iter(rows(grey, [10, 20, 30, 40, 50])), batch=2))
    assert [(r.row, round(255 * r.detection.scores["bright"])) for r in records] == [(f"r{v}", v) for v in (10, 20, 30, 40, 50)]
    assert detector.batches == [2, 2, 1]


def test_images_are_read_a_batch_at_a_time(fixed, grey):
    read = []

    def source():
        for row in rows(grey, range(1, 100)):
            read.append(row[0])
            yield row

    records = run(fixed(), source(), batch=4)
    next(records)
    assert len(read) == 4


def test_an_exception_stops_with_the_row_named(fixed, grey):
    records = run(fixed(fail_on=40), rows(grey, [10, 20, 30, 40, 50, 60]), batch=3)
    assert [next(records).row for _ in range(3)] == ["r10", "r20", "r30"]
    with pytest.raises(ErasureError, match="fixed failed on row r40: out of memory"):
        next(records)


def test_a_failure_of_the_batch_alone_names_all_its_rows(fixed, grey):
    class Crowded(fixed):  # type: ignore[misc, valid-type]
        def detect(self, images):
            if len(images) > 1:
                raise RuntimeError("too many")
            return super().detect(images)

    with pytest.raises(ErasureError, match="rows r1, r2 together: too many"):
        list(run(Crowded(), rows(grey, [1, 2])))


def test_a_truncated_file_names_its_row(fixed, grey, tmp_path):
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ErasureError, match="row cut"):
        list(run(fixed(), [("whole", grey(9)), ("cut", Image.open(path))]))


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_no_call(fixed, grey, score):
    with pytest.raises(ErasureError, match="'bright' in row r7"):
        list(run(fixed(score=score), rows(grey, [7])))


def test_missing_answers_repeated_rows_and_no_images_are_errors(fixed, grey):
    with pytest.raises(ErasureError, match="answered for 1 of 2 images, rows r1 to r2"):
        list(run(fixed(answers=1), rows(grey, [1, 2])))
    with pytest.raises(ErasureError, match="row r1 was given to the detector fixed twice"):
        list(run(fixed(), rows(grey, [1, 1])))
    with pytest.raises(ErasureError, match="no images"):
        list(run(fixed(), []))
    with pytest.raises(ErasureError, match="at least 1"):
        list(run(fixed(), rows(grey, [1]), batch=0))


def test_black_is_refused_and_dark_is_not(fixed, grey):
    assert refused(grey(0)) and refused(grey(4)) and not refused(grey(5))
    assert refused(Image.new("L", (8, 8), 0)) and refused(Image.new("RGBA", (8, 8), (0, 0, 0, 255)))
    spot = grey(0)
    spot.putpixel((3, 3), (0, 0, 90))
    assert not refused(spot) and not refused(grey(255))
    assert [r.refused for r in run(fixed(), rows(grey, [0, 200]))] == [True, False]


def test_a_detection_survives_json(fixed):
    from erasure.eval.detectors import Box

    whole = Detection((Box("FACE_FEMALE", 0.72, (1.0, 2.5, 3.0, 4.0)),), {"nsfw": 0.25})
    assert Detection.from_dict(whole.to_dict()) == whole
    assert whole.findings() == [("FACE_FEMALE", 0.72), ("nsfw", 0.25)]
