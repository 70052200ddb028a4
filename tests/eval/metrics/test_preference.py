from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from erasure.errors import ErasureError
from erasure.eval import weights
from erasure.eval.metrics import metrics
from erasure.eval.metrics.preference import ImageReward, PickScore
from erasure.eval.rows import Row
from tests import tiny

Rows = Callable[..., list[Any]]
Noise = Callable[..., Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of PickScore's kind, in transformers' format."""
    path, words = tmp_path_factory.mktemp("pickscore"), tiny.tokenizer(12)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 12, "eos_token_id": words.eos_token_id}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, words).save_pretrained(path)
    return path


def test_pick_score_is_temperature_times_cosine(folder: Path, noise: Noise) -> None:
    asked = [Row(f"row-{i}", "other", prompt, i) for i, prompt in enumerate(["a cat", "a dog in the night", "the boat " * 8])]
    images = noise(3, 1, side=40)
    metric = PickScore(folder)
    metric.update(images[:2], asked[:2])
    metric.update(images[2:], asked[2:])
    net, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    expected = []
    for image, row in zip(images, asked, strict=True):  # one pair at a time, towers and cosine apart
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        pixels = processor.image_processor(images=picture, return_tensors="pt")
        text = processor.tokenizer(row.prompt, truncation=True, max_length=12, return_tensors="pt")
        with torch.inference_mode():
            a = net.visual_projection(net.vision_model(**pixels).pooler_output)[0]
            b = net.text_projection(net.text_model(**text).pooler_output)[0]
            expected.append((net.logit_scale.exp() * (a @ b) / a.norm() / b.norm()).item())
    assert len({round(value, 3) for value in expected}) == 3
    samples = metric.samples()
    assert [s["pick_score"] for s in samples.values()] == pytest.approx(expected, rel=1e-3)
    assert [s["truncated"] for s in samples.values()] == [0, 0, 1]
    assert len(metric.identity()["sha256"]) == 64


def test_a_missing_pick_score_names_what_it_wants(tmp_path: Path, rows: Rows, noise: Noise) -> None:
    with pytest.raises(ErasureError) as caught:
        PickScore(tmp_path / "nothing").update(noise(1), rows(1))
    for part in ("model.safetensors", str(tmp_path / "nothing"), "MIT", "model= and processor="):
        assert part in str(caught.value)
    assert PickScore().processor == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class Brightness:
    """The package's interface: a prompt and a picture to a number."""

    def score(self, prompt: str, picture: Image.Image) -> float:
        return len(prompt) + picture.getpixel((0, 0))[0] / 255  # type: ignore[index]


def test_image_reward_is_the_packages_score(rows: Rows) -> None:
    metric = ImageReward(net=Brightness())
    images = torch.stack([torch.full((3, 8, 8), level) for level in (0.0, 1.0)])
    metric.update(images, rows(2))
    assert [s["image_reward"] for s in metric.samples().values()] == [21.0, 22.0] and metric.compute() == 21.5


def test_image_reward_loads_the_given_files_by_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Rows, noise: Noise
) -> None:
    for name in ("ImageReward.pt", "med_config.json"):
        (tmp_path / name).write_text(name)
    asked: dict[str, Any] = {}

    def load(path: str, **options: Any) -> Brightness:
        asked.update(options, path=path)
        return Brightness()

    monkeypatch.setitem(__import__("sys").modules, "ImageReward", SimpleNamespace(load=load))
    ImageReward(tmp_path).update(noise(1), rows(1))
    assert asked == {"path": str(tmp_path / "ImageReward.pt"), "device": "cpu", "med_config": str(tmp_path / "med_config.json")}


def test_image_reward_without_package_or_weights_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Rows, noise: Noise) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ImageReward", None)
    with pytest.raises(ErasureError, match="pip install image-reward"):
        ImageReward(tmp_path).update(noise(1), rows(1))
    monkeypatch.setitem(__import__("sys").modules, "ImageReward", SimpleNamespace(load=lambda *_, **__: None))
    with pytest.raises(ErasureError, match=r"File: ImageReward\.pt; source: https://huggingface.co/THUDM/ImageReward.*Apache-2.0"):
        ImageReward(tmp_path).update(noise(1), rows(1))
    assert weights.WEIGHTS["ImageReward-v1.0"].sha256 is None  # no source states it, so none is claimed


def test_every_registered_metric_is_named_as_it_calls_itself() -> None:
    from erasure.eval.metrics.base import ImageMetric

    for name in metrics.names():
        found = metrics.get(name)
        assert issubclass(found, ImageMetric) and found.name == name
        assert found.higher_is_better is not None or name in ("lpips", "st_lpips")
