"""Detectors whose files have to be given: v2 of NudeNet, Q16, zero-shot CLIP and classifiers, on tiny stand-ins of the same interface."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from erasure.errors import ErasureError
from erasure.eval.detectors import detectors, load, missing, run
from erasure.eval.detectors.classifier import IMAGENETTE
from erasure.eval.detectors.clip import prompt_vectors

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ERASURE_WEIGHTS", str(tmp_path))


def plain(colour, size=(40, 20)):
    return Image.new("RGB", size, COLOURS[colour])


class Embedder(nn.Module):
    """A CLIP of the mean colour: text tokens are the colours' own."""

    context_length = 3

    def encode_image(self, images):
        return images.mean((2, 3))

    def encode_text(self, tokens):
        return torch.eye(3)[tokens[:, 0]]


def colour_clip():
    def tokens(texts, context_length=3):
        return torch.tensor([[list(COLOURS).index(t)] * context_length for t in texts])

    def pixels(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    return Embedder(), tokens, pixels


def test_zero_shot_shares_by_hand():
    detector = load("clip-zeroshot", labels={"r": "red", "b": "blue"}, model=colour_clip())
    red, mixed = plain("red"), Image.new("RGB", (8, 8), (200, 0, 100))
    first, second = (d.scores for d in detector.detect([red, plain("red")]))
    assert first == second and first["r"] == pytest.approx(1) and set(first) == {"r", "b"}
    (scores,) = (d.scores for d in detector.detect([mixed]))
    cosines = torch.tensor([200.0, 100.0]) / np.hypot(200, 100)
    assert scores["b"] == pytest.approx(float((100 * cosines).softmax(0)[1]), abs=1e-5)
    identity = detector.identity()
    assert identity.labels == ("r", "b") and identity.settings["texts"] == {"r": "red", "b": "blue"}
    with pytest.raises(ErasureError, match="two or more"):
        load("clip-zeroshot", labels={"r": "red"}, model=colour_clip())


def test_q16_is_the_second_share_and_its_call_is_over_a_half():
    vectors = torch.tensor([[5.0, 0, 0], [0, 0, 0.1]])  # their lengths do not count
    detector = load("q16", vectors=vectors, model=colour_clip())
    scores = [d.scores["inappropriate"] for d in detector.detect([plain("red"), plain("blue"), plain("green")])]
    assert scores == pytest.approx([0, 1, 0.5], abs=1e-6)
    even = Image.new("RGB", (4, 4), (120, 0, 121))
    assert 0.5 < detector.detect([even])[0].scores["inappropriate"] < 0.8
    assert detector.identity().labels == ("inappropriate",)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_q16s_pickle_is_read_without_running_it(tmp_path, kind):
    vectors = np.random.default_rng(0).normal(size=(1, 2, 768)).astype(kind)
    path = tmp_path / "prompts.p"
    path.write_bytes(pickle.dumps(vectors, protocol=3))
    assert (prompt_vectors(path).numpy() == vectors[0].astype(np.float32)).all()


class Trap:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize("content", [Trap(), [np.zeros(1536), Trap()], np.zeros(3), {"a": 1}, np.zeros((2, 768), dtype=np.int64)])
def test_another_pickle_is_refused_and_not_run(tmp_path, capsys, content):
    path = tmp_path / "prompts.p"
    path.write_bytes(pickle.dumps(content, protocol=3))
    with pytest.raises(ErasureError, match="no pickle of one numpy array"):
        prompt_vectors(path)
    path.write_bytes(b"no pickle at all")
    with pytest.raises(ErasureError, match="no pickle"):
        prompt_vectors(path)
    assert capsys.readouterr().out == ""


def test_v2_detector_scales_subtracts_and_reads_its_outputs():
    seen = []

    def session(images):
        seen.append(images)
        corners = np.array([[[80.0, 160, 240, 320], [0, 0, 8, 8], [-1, -1, -1, -1]]], dtype=np.float32)
        scores = np.array([[0.9, 0.04, -1]], dtype=np.float32)
        return [corners, scores, np.array([[11, 5, -1]], dtype=np.int32)]

    detector = load("nudenet-v2", session=session)
    (found,) = detector.detect([plain("red", (100, 50))])
    assert seen[0].shape == (1, 666, 1333, 3)  # 50 would become 800, but 100 must not pass 1333
    assert seen[0][0, 0, 0] == pytest.approx([-103.939, -116.779, 255 - 123.68], abs=1e-3)
    (box,) = found.boxes  # .04 is not stored, -1 is no box
    assert (box.label, box.score) == ("EXPOSED_BREAST_F", 0.9)
    assert box.xywh == pytest.approx((6.0, 12.0, 12.0, 12.0), abs=0.05)
    detector.detect([plain("red", (100, 80))])
    assert seen[1].shape == (1, 800, 1000, 3)


def test_v2_base_has_labels_of_its_own_and_the_classifier_puts_unsafe_first():
    def session(images):
        return [np.zeros((1, 1, 4), np.float32), np.full((1, 1), 0.7, np.float32), np.full((1, 1), 2, np.int32)]

    assert load("nudenet-v2-base", session=session).detect([plain("red")])[0].boxes[0].label == "EXPOSED_BREAST_F"

    def classify(images):
        assert images.shape == (2, 256, 256, 3) and images.max() == 1
        return [np.stack([images[..., 0].mean((1, 2)), images[..., 1].mean((1, 2))], axis=1)]

    found = load("nudenet-v2-classifier", session=classify).detect([plain("red"), plain("green")])
    assert [d.scores for d in found] == [{"unsafe": 1.0, "safe": 0.0}, {"unsafe": 0.0, "safe": 1.0}]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("nudenet-v2", "detector_v2_default_checkpoint.onnx"),
        ("nudenet-v2-base", "detector_v2_base_checkpoint.onnx"),
        ("nudenet-v2-classifier", "classifier_model.onnx"),
        ("q16", "prompts.p"),
    ],
)
def test_a_file_that_is_not_there_is_named_with_its_source(name, file, tmp_path):
    assert missing(name).startswith(f"{file} (https://github.com/")
    with pytest.raises(ErasureError, match=file):
        load(name)
    (tmp_path / file).write_bytes(b"something else")
    if name == "q16":
        assert missing(name)  # its hash is known
        with pytest.raises(ErasureError, match="9b6c4118"):
            load(name)
    else:
        assert missing(name) == ""


class Middle(nn.Module):
    """Logits that are the colours of the middle of the picture."""

    def forward(self, images):
        return 10 * images[:, :, 50:60, 50:60].mean((2, 3))


def test_classifier_probabilities_and_first_place():
    plainly = ((0, 0, 0), (1, 1, 1))
    labels = {"r": 0, "b": 2}
    detector = load("classifier", model="timm:none", labels=labels, classes=3, side=112, resize=112, normalise=plainly, module=Middle())
    image = plain("green", (300, 100))
    image.paste(COLOURS["blue"], (100, 0, 200, 100))  # the centre crop is blue alone
    (found,) = detector.detect([image])
    expected = torch.tensor([0.0, 0, 10]).softmax(0)
    assert found.scores["b"] == pytest.approx(float(expected[2]), abs=1e-4) and found.scores["r"] == pytest.approx(
        float(expected[0]), abs=1e-5
    )
    assert (found.scores["top1:b"], found.scores["top1:r"]) == (1.0, 0.0)
    assert detector.identity().labels == ("r", "b", "top1:r", "top1:b")
    wrong = load("classifier", model="timm:none", labels=labels, classes=4, normalise=plainly, module=Middle())
    with pytest.raises(ErasureError, match=r"row x: .*of 4 classes"):
        list(run(wrong, [("x", image)]))
    with pytest.raises(ErasureError, match="classes 0 to 999"):
        load("classifier", model="timm:none", labels={"x": 1000}, module=Middle())


@pytest.mark.parametrize("library", ["torchvision:mobilenet_v3_small", "timm:mobilenetv3_small_050"])
def test_a_classifier_of_each_library_from_its_file(library, tmp_path):
    name, _, model = library.partition(":")
    package = pytest.importorskip(name, reason="optional")
    torch.manual_seed(0)
    if name == "timm":
        net = package.create_model(model, num_classes=5)
    else:
        net = pytest.importorskip("torchvision.models").get_model(model, num_classes=5)
    path = tmp_path / "weights.pth"
    torch.save(net.state_dict(), path)
    image = Image.effect_noise((70, 64), 80).convert("RGB")
    given = load("classifier", model=library, labels={"x": 3}, classes=5, side=64, resize=64, path=path)
    injected = load("classifier", model=library, labels={"x": 3}, classes=5, side=64, resize=64, module=net)
    assert given.detect([image]) == injected.detect([image])
    assert given.identity().sha256 != "" and injected.identity().file == "injected"
    with pytest.raises(ErasureError, match="does not fit"):
        load("classifier", model=library, labels={"x": 3}, classes=6, path=path)
    with pytest.raises(ErasureError, match="needs its weight file"):
        load("classifier", model=library, labels={"x": 3}, classes=5)
    with pytest.raises(ErasureError, match="timm:NAME or torchvision:NAME"):
        load("classifier", model="resnet50", labels={"x": 3}, classes=5, path=path)


def test_imagenettes_indices_are_those_of_imagenet():
    categories = pytest.importorskip("torchvision.models._meta")._IMAGENET_CATEGORIES
    names = {label: categories[index].lower() for label, index in IMAGENETTE.items()}
    assert all(label in name or name in label for label, name in names.items()), names
    assert len(IMAGENETTE) == 10


def test_the_canvas_judge_gives_its_calls(monkeypatch):
    from erasure.canvas.judging import Verdict
    from erasure.canvas.world import world

    of = world()
    verdict = Verdict(
        torch.full((2, len(of.objects)), 0.25),
        torch.zeros(2, len(of.objects), dtype=torch.bool),
        torch.tensor([1, 0]),
        torch.tensor([0, 1]),
        torch.tensor([False, True]),
    )
    verdict.present[0, 3] = True
    seen = []

    def judging(images):
        seen.append(images)
        return verdict

    detector = load("canvas", judging=judging)
    first, second = detector.detect([plain("red", (64, 64)), plain("blue", (64, 64))])
    assert seen[0].shape == (2, 3, 64, 64) and seen[0][0, 0].min() == 1 and seen[0][1, 2].max() == 1
    assert first.scores[f"present:{of.objects[3]}"] == 1 and first.scores[of.objects[3]] == 0.25
    assert first.scores[f"style:{of.styles[1]}"] == 1 and "unrecognised" not in first.scores
    assert second.scores["unrecognised"] == 1 and not any(label.startswith("present:") for label in second.scores)
    assert set(first.scores) | set(second.scores) <= set(detector.identity().labels)


@pytest.mark.parametrize("judge", ["canvas/judge_test", "canvas/judge_dev"])
def test_both_judges_recognise_no_object_in_noise(judge):
    detector = load("canvas", judge_name=judge)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    (found,) = detector.detect([noise])
    assert found.scores["unrecognised"] == 1 and not any(label.startswith("present:") for label in found.scores)
    assert len(detector.identity().sha256) == 64
    with pytest.raises(ErasureError, match=r"row big: .*\(1, 3, 65, 65\)"):
        list(run(detector, [("big", noise.resize((65, 65)))]))


def test_registry_names_every_detector_and_guesses():
    assert {"nudenet", "opennsfw", "q16", "clip-zeroshot", "classifier", "canvas", "external"} <= set(detectors.names())
    for name in detectors.names():
        assert detectors.get(name).name == name
    with pytest.raises(ErasureError, match="did you mean nudenet"):
        load("nudnet")
