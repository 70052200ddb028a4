"""Predictions of another tool: three forms, one meaning; what was not looked at is an error."""

import json

import pytest
from PIL import Image

from erasure.errors import ErasureError
from erasure.eval.detectors import Detection, run
from erasure.eval.detectors.external import External

TOOL = {"tool": "giphy-celebrity-detector", "version": "1", "licence": "MPL-2.0"}


def forms(tmp_path):
    one = tmp_path / "predictions.json"
    one.write_text(json.dumps({"a": {"someone": 0.9}, "b.png": []}))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.json").write_text('{"someone": 0.9}')
    (folder / "b.json").write_text("{}")
    table = tmp_path / "predictions.csv"
    table.write_text("image,label,score\na.png,someone,0.9\nb.png,,\n")
    return [one, folder, table]


def pictures(*rows):
    return [(row, Image.new("RGB", (8, 8), (9, 9, 9))) for row in rows]


def test_three_forms_say_the_same_by_row_id(tmp_path):
    for path in forms(tmp_path):
        records = list(run(External(path, **TOOL), pictures("b", "a"), batch=1))
        assert [r.row for r in records] == ["b", "a"]
        assert [r.detection for r in records] == [Detection(), Detection(scores={"someone": 0.9})]


def test_images_are_known_by_their_file_names(tmp_path):
    path = tmp_path / "a.png"
    pictures("a")[0][1].save(path)
    detector = External(forms(tmp_path)[0], **TOOL)
    assert detector.detect([Image.open(path)]) == [Detection(scores={"someone": 0.9})]
    with pytest.raises(ErasureError, match="an image without file name"):
        detector.detect([Image.new("RGB", (8, 8))])


def test_missing_rows_are_named(tmp_path):
    for path in forms(tmp_path):
        detector = External(path, **TOOL)
        with pytest.raises(ErasureError, match=r"on row c: .*no prediction for c: run giphy-celebrity-detector on every image"):
            list(run(detector, pictures("a", "c", "b"), batch=2))
        with pytest.raises(ErasureError, match=r"no prediction for r0, .*r9 and 15 more"):
            detector.require(["a", *(f"r{i}" for i in range(25))])


def test_boxes_in_both_forms(tmp_path):
    one, table = tmp_path / "p.json", tmp_path / "p.csv"
    one.write_text('{"a": [{"class": "x", "score": 0.5, "box": [1, 2, 3, 4]}, {"label": "y", "score": 0.1}, {"label": "y", "score": 0.3}]}')
    table.write_text("row,label,score,x,y,w,h\na,x,0.5,1,2,3,4\na,y,0.1,,,,\na,y,0.3,,,,\n")
    found = [External(path, **TOOL).detect_rows(["a"])[0] for path in (one, table)]
    assert found[0] == found[1]
    assert found[0].boxes[0].xywh == (1.0, 2.0, 3.0, 4.0) and found[0].scores == {"y": 0.3}


def test_identity_follows_the_content(tmp_path):
    one, folder, _ = forms(tmp_path)
    before = External(one, **TOOL).identity()
    assert before.settings == {"tool": "giphy-celebrity-detector"} and before.licence == "MPL-2.0" and before.labels == ()
    one.write_text(one.read_text().replace("0.9", "0.8"))
    assert External(one, **TOOL).identity().sha256 != before.sha256
    hashed = External(folder, **TOOL).identity().sha256
    (folder / "c.json").write_text("{}")
    assert External(folder, **TOOL).identity().sha256 != hashed


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", "[1]", "not in the form"),
        ("p.json", '{"a": [{"score": 1}]}', "not in the form"),
        ("p.json", '{"a": {"x": "high"}}', "not in the form"),
        ("p.json", '{"a": {}, "a.png": {}}', "a.png has two predictions"),
        ("p.json", "{}", "holds no predictions"),
        ("p.csv", "file,label,score\na,x,1\n", "not in the form"),
        ("p.csv", "row,label,score\na,x,\n", "not in the form"),
    ],
)
def test_another_form_is_an_error(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ErasureError, match=message):
        External(tmp_path / name, **TOOL)


def test_no_file_at_all(tmp_path):
    with pytest.raises(ErasureError, match="no predictions at"):
        External(tmp_path / "none", **TOOL)
