import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from erasure.errors import ErasureError
from erasure.eval.metrics import clip
from erasure.eval.metrics.clip_score import CLIPScore
from erasure.eval.metrics.distances import CMMD
from erasure.eval.rows import Row

Rows = Callable[..., list[Any]]
Noise = Callable[..., Tensor]
CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
LONG = "a very long prompt about a cat that sits on a mat and looks at the moon"


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return open_clip.CLIP(**CONFIG).eval()


@pytest.fixture(scope="module")
def given(model: Any) -> tuple[Any, Any, Any]:
    return model, open_clip.get_tokenizer("ViT-B-32"), image_transform(32, is_train=False)


def cosines(given: tuple[Any, Any, Any], images: Tensor, prompts: list[str]) -> Tensor:
    """One pair at a time, by open_clip alone."""
    model, tokenizer, preprocess = given
    out = []
    with torch.inference_mode():
        for image, prompt in zip(images, prompts, strict=True):
            a = model.encode_image(preprocess(Image.fromarray(image.permute(1, 2, 0).numpy()))[None])[0]
            b = model.encode_text(tokenizer([prompt], context_length=12))[0]
            out.append((a @ b) / a.norm() / b.norm())
    return torch.stack(out)


def test_the_score_is_the_direct_computation(given: Any, rows: Rows, noise: Noise) -> None:
    images, asked = noise(6, 1, side=40), [*rows(3), *rows(3, 3, "the moon over {} boats")]
    metric = CLIPScore(given)
    metric.update(images[:4], asked[:4])
    metric.update(images[4:], asked[4:])
    expected = cosines(given, images, [row.prompt for row in asked])
    assert expected.std() > 1e-3 and (expected > 0).all()
    samples = metric.samples()
    assert list(samples) == [row.id for row in asked]
    assert torch.allclose(torch.tensor([s["cosine"] for s in samples.values()]), expected, atol=1e-5)
    assert torch.allclose(torch.tensor([s["clip_score"] for s in samples.values()]), 100 * expected.clamp(min=0), atol=1e-3)
    record = metric.result()
    assert (
        record["value"]
        == pytest.approx(metric.compute().item(), rel=1e-5)
        == pytest.approx(100 * expected.clamp(min=0).mean().item(), abs=1e-3)
    )
    assert record["lo"] < record["value"] < record["hi"] and record["n"] == record["prompts"] == 6
    assert record["fields"]["cosine"]["value"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert record["warnings"] == [] and json.dumps(record)


def test_a_negative_cosine_scores_zero_and_stays_on_record(given: Any, rows: Rows, noise: Noise) -> None:
    model, *rest = given
    flipped = copy.deepcopy(model)
    flipped.visual.proj.data *= -1
    metric = CLIPScore((flipped, *rest))
    metric.update(noise(2, 1), rows(2))
    assert metric.compute() == 0
    expected = -cosines(given, noise(2, 1), [row.prompt for row in rows(2)])
    assert [s["cosine"] for s in metric.samples().values()] == pytest.approx(expected.tolist(), abs=1e-5) and (expected < 0).all()


def test_truncation_is_counted_or_refused(given: Any, noise: Noise) -> None:
    # 12 tokens hold the start, ten words and the end.
    ten, eleven = "a " * 9 + "cat", "a " * 10 + "cat"
    asked = [Row(f"row-{i}", "other", prompt, i) for i, prompt in enumerate([ten, eleven, LONG, "a cat!"])]
    metric = CLIPScore(given)
    metric.update(noise(4), asked)
    assert [s["truncated"] for s in metric.samples().values()] == [0, 1, 1, 0]
    assert metric.truncated() == 2
    assert metric.result()["warnings"] == ["2 of 4 prompts are over 12 tokens and were scored by their beginning"]
    with pytest.raises(ErasureError, match="row-1, row-2 are over the 12 tokens"):
        CLIPScore(given, truncate=False).update(noise(4), asked)
    CLIPScore(given, truncate=False).update(noise(2), [asked[0], asked[3]])


def test_scores_do_not_depend_on_the_batch_and_merge(given: Any, rows: Rows, noise: Noise) -> None:
    images, asked = noise(7, 3), rows(7)
    whole, first, second = CLIPScore(given), CLIPScore(given), CLIPScore(given)
    whole.update(images, asked)
    first.update(images[:2], asked[:2])
    second.update(images[2:], asked[2:])
    first.merge_state(second)
    one, other = first.samples(), whole.samples()
    assert set(one) == set(other)
    for row in other:
        assert one[row]["cosine"] == pytest.approx(other[row]["cosine"], abs=1e-5)  # type: ignore[type-var]
    whole.reset()
    with pytest.raises(ErasureError, match="no images"):
        whole.samples()


def test_a_model_folder_loads_with_its_own_transform(model: Any, given: Any, rows: Rows, noise: Noise, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    folder, direct = CLIPScore(f"local-dir:{tmp_path}"), CLIPScore(given)
    for metric in (folder, direct):
        metric.update(noise(3, 5, side=50), rows(3))
    assert folder.compute().item() == pytest.approx(direct.compute().item(), abs=1e-4)
    assert folder.identity()["sha256"] == direct.identity()["sha256"]
    assert clip.load(f"local-dir:{tmp_path}") is folder.clip


def test_cmmd_takes_the_image_tower(given: Any, rows: Rows, noise: Noise) -> None:
    shared = clip.load(given)
    metric = CMMD(features=shared.extractor)
    metric.update(noise(5, 1), rows(5), base=noise(5, 2, bright=0.1))
    with torch.inference_mode():
        assert torch.allclose(metric.table(), shared.images(noise(5, 1)), atol=1e-5)
    assert metric.compute().item() > 0 and metric.identity()["features"]["sha256"] == shared.sha256


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """open_clip as it is without a network; remembers how it was asked."""
    asked: list[dict[str, Any]] = []

    def fail(model: str, **options: Any) -> Any:
        asked.append(options)
        raise RuntimeError("Failed to download weights for tag")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", fail)
    clip._named.cache_clear()
    yield asked
    clip._named.cache_clear()


def test_missing_weights_name_their_source(no_weights: list[dict[str, Any]], rows: Rows, noise: Noise) -> None:
    metric = CLIPScore()
    with pytest.raises(ErasureError) as caught:
        metric.update(noise(1), rows(1))
    for part in (
        "ViT-B-32/openai",
        "timm/vit_base_patch32_clip_224.openai",
        "40d365715913c9da98579312b702a82c",
        "local-dir:",
        "laion2b_e16",
    ):
        assert part in str(caught.value)


def test_openai_weights_get_the_activation_that_they_were_trained_with(no_weights: list[dict[str, Any]], rows: Rows, noise: Noise) -> None:
    """open_clip builds ViT-B-32 with the exact GELU and only warns that these weights want the quick one."""
    for tag in ("openai", "laion2b_s34b_b79k"):
        with pytest.raises(ErasureError):
            CLIPScore("ViT-B-32", tag).update(noise(1), rows(1))
    assert [options["force_quick_gelu"] for options in no_weights] == [True, False]


def test_random_weights_are_refused(rows: Rows, noise: Noise) -> None:
    with pytest.raises(ErasureError, match="random weights"):
        CLIPScore("ViT-B-32", None).update(noise(1), rows(1))
