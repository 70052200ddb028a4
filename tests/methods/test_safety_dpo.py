"""The DPO loss by hand in float64, the pairs that a detector drops, and what a fit learns."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure.adapter import AdapterEraser
from erasure.canvas.concepts import canvas_concept
from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.method import Run
from erasure.methods import safety_dpo
from erasure.methods.safety_dpo import SafetyDPO
from erasure.models import load_base
from erasure.testing.subject import CONCEPT
from erasure.testing.tiny import sd1

QUICK: dict[str, Any] = {"steps": 2, "lr": 0.05, "batch": 2, "sampling_steps": 2, "size": 16, "images": 2, "warmup": 0}


def rand(seed: int) -> Tensor:
    return torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.5, 5.0, 5000.0])
def test_the_loss_is_that_of_the_paper(beta: float) -> None:
    pred_w, pred_l, ref_w, ref_l, noise_w, noise_l = (rand(seed) for seed in range(6))
    total = 0.0
    for i in range(3):

        def error(a: Tensor, b: Tensor, i: int = i) -> float:
            return sum((float(x) - float(y)) ** 2 for x, y in zip(a[i].flatten(), b[i].flatten(), strict=True)) / 16

        model, reference = error(pred_w, noise_w) - error(pred_l, noise_l), error(ref_w, noise_w) - error(ref_l, noise_l)
        z = -beta / 2 * (model - reference)
        total += math.log1p(math.exp(-z)) if z > 0 else -z + math.log1p(math.exp(z))
    found = safety_dpo.loss(pred_w, pred_l, ref_w, ref_l, noise_w, noise_l, beta)
    assert float(found) == pytest.approx(total / 3, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_beta_does_not_magnify_the_rounding_of_half_precision(dtype: torch.dtype) -> None:
    noise = rand(0)
    given = [(noise + 0.3 * rand(seed)).to(dtype) for seed in range(1, 5)] + [noise.to(dtype)]
    found, exact = (
        float(safety_dpo.loss(safe, unsafe, ref_safe, ref_unsafe, drawn, drawn, 5000.0))
        for safe, unsafe, ref_safe, ref_unsafe, drawn in (given, [each.double() for each in given])
    )
    assert found == pytest.approx(exact, rel=1e-4)


def test_a_model_that_is_the_reference_is_undecided() -> None:
    some = [rand(seed) for seed in range(4)]
    assert float(safety_dpo.loss(some[0], some[1], some[0], some[1], some[2], some[3], 5000.0)) == pytest.approx(math.log(2))


def test_training_moves_towards_the_safe_image() -> None:
    """The gradient lowers the error on the safe image and raises that on the unsafe one."""
    safe, unsafe = rand(0).requires_grad_(), rand(1).requires_grad_()
    noise = rand(2)
    safety_dpo.loss(safe, unsafe, rand(0), rand(1), noise, noise, 1.0).backward()
    assert safe.grad is not None and unsafe.grad is not None
    assert float((safe.grad * (safe - noise)).sum()) > 0 > float((unsafe.grad * (unsafe - noise)).sum())


def test_an_expert_is_a_lora_of_attention_and_nothing_of_the_base_moves() -> None:
    pipe = sd1()
    before = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    eraser = SafetyDPO.from_config(QUICK).fit(pipe, [CONCEPT], run=Run(progress=False))
    assert isinstance(eraser, AdapterEraser) and all("attn" in name for name in eraser.factors)
    assert {len(t) for name, t in eraser.factors.items() if "lora_A" in name} == {4}
    assert all(torch.equal(p, before[name]) for name, p in pipe.unet.named_parameters())


class Seer:
    """A detector that sees a fixed list of images."""

    name = "seer"

    def __init__(self, scores: list[float]) -> None:
        self.scores = iter(scores)

    def identity(self) -> Any:
        return type("Identity", (), {"labels": ("present:dagger", "present:cat")})

    def detect(self, images: Any) -> list[Any]:
        from erasure.eval.detectors import Detection

        return [Detection(scores={"present:dagger": next(self.scores), "present:cat": 1.0}) for _ in images]


def fitted(monkeypatch: pytest.MonkeyPatch, scores: list[float], caplog: Any) -> str:
    monkeypatch.setattr(safety_dpo, "Watcher", lambda: Seer(scores), raising=False)
    caplog.set_level("INFO", "erasure")
    method = SafetyDPO.from_config({**QUICK, "images": 3, "detector": "erasure.methods.safety_dpo:Watcher", "labels": ("present:dagger",)})
    method.fit(sd1(), [Concept("dagger", anchors=("cat",))], run=Run(progress=False))
    return str(caplog.text)


def test_pairs_that_show_no_difference_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Seen and gone: kept. Never seen: dropped after one look. Seen in both: dropped."""
    said = fitted(monkeypatch, [0.9, 0.1, 0.2, 0.9, 0.8], caplog)
    assert "1 of 3 pairs kept; 1 lack the concept, 1 have it with the anchor's prompt too" in said


def test_no_usable_pair_is_an_error_with_the_counts(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    with pytest.raises(ErasureError, match="no usable pair: 0 of 3 pairs kept; 3 lack the concept"):
        fitted(monkeypatch, [0.1, 0.1, 0.1], caplog)


def test_the_canvas_judge_looks_for_the_targets_of_the_concept() -> None:
    pipe = load_base("canvas", device="cpu")
    quick = {**QUICK, "size": None, "preset": "canvas"}
    with pytest.raises(ErasureError, match="the canvas judge knows no target of 'zeppelin'"):
        SafetyDPO.from_config(quick).fit(pipe, [Concept("zeppelin", anchors=("cat",))], run=Run(progress=False))
    seconds = {"sampling_steps": 10, "images": 4, "steps": 1}
    SafetyDPO.from_config({**quick, **seconds}).fit(pipe, [canvas_concept("dagger")], run=Run(progress=False))


@pytest.mark.parametrize(
    "wrong", [{"beta": 0.0}, {"drop": 1.0}, {"warmup": -1}, {"threshold": 0.0}, {"layers": ("nowhere",)}, {"detector": "no.such:Thing"}]
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ErasureError):
        SafetyDPO.from_config({**QUICK, **wrong}).fit(sd1(), [CONCEPT], run=Run(progress=False))


def test_no_gradient_flows_into_the_reference() -> None:
    safe, unsafe, ref_safe, ref_unsafe = (rand(seed).requires_grad_() for seed in range(4))
    safety_dpo.loss(safe, unsafe, ref_safe, ref_unsafe, rand(4), rand(5), 5.0).backward()
    assert safe.grad is not None and unsafe.grad is not None and ref_safe.grad is None and ref_unsafe.grad is None


@pytest.mark.parametrize(("part", "inside"), [("selfattn", ".attn1."), ("kv", ".attn2.to_")])
def test_layers_are_those_of_the_part(part: Any, inside: str) -> None:
    eraser = SafetyDPO.from_config({**QUICK, "part": part}).fit(sd1(), [CONCEPT], run=Run(progress=False))
    assert isinstance(eraser, AdapterEraser) and all(inside in name for name in eraser.factors)
    with pytest.raises(ErasureError, match=r"none of the layers to_out\.0 is in the part 'kv'"):
        SafetyDPO.from_config({**QUICK, "part": "kv", "layers": ("to_out.0",)}).fit(sd1(), [CONCEPT], run=Run(progress=False))


def test_a_large_beta_is_not_taken_for_divergence() -> None:
    assert SafetyDPO(beta=1e6).ceiling() == 5e8 and SafetyDPO(beta=1.0).ceiling() == 1e3
