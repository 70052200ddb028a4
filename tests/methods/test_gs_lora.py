"""GS-LoRA: the group lasso and its proximal step by hand, the bound, and concepts one after another."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.method import Run
from erasure.methods import gs_lora
from erasure.methods.gs_lora import GSLoRA
from erasure.testing.subject import CONCEPT
from erasure.testing.tiny import FAMILIES, sd1
from erasure.training import train

QUICK: dict[str, Any] = {"steps": 2, "lr": 0.02, "batch": 2, "sampling_steps": 2, "size": 16, "images": 2, "rank": 2}


def test_group_lasso_is_the_sum_of_norms_of_groups() -> None:
    groups = [[torch.randn(3, 4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)], [torch.randn(5, dtype=torch.float64)]]
    by_hand = sum(math.sqrt(sum(float(v) ** 2 for t in group for v in t.flatten())) for group in groups)
    assert float(gs_lora.group_lasso(groups)) == pytest.approx(by_hand, rel=1e-12)
    assert float(gs_lora.group_lasso([])) == 0


def test_the_gradient_at_a_group_of_zeros_is_zero_and_no_nan() -> None:
    zero, other = torch.zeros(3, requires_grad=True), torch.tensor([3.0, 4.0], requires_grad=True)
    gs_lora.group_lasso([[zero], [other]]).backward()
    assert zero.grad is not None and other.grad is not None
    assert zero.grad.tolist() == [0, 0, 0] and other.grad.tolist() == pytest.approx([0.6, 0.8])


def test_shrinking_solves_the_proximal_problem() -> None:
    """Nothing near it has less of amount x norm + half the squared distance."""
    start = torch.tensor([3.0, 4.0], dtype=torch.float64)
    found = start.clone()
    gs_lora.shrink([[found]], 2.0)
    assert found.tolist() == pytest.approx([1.8, 2.4])

    def cost(x: torch.Tensor) -> float:
        return float(2.0 * x.norm() + 0.5 * (x - start).square().sum())

    draw = torch.Generator().manual_seed(0)
    assert all(cost(found + 0.1 * torch.randn(2, generator=draw, dtype=torch.float64)) > cost(found) for _ in range(50))
    small = torch.tensor([0.1, 0.1])
    gs_lora.shrink([[small]], 2.0)
    assert small.tolist() == [0, 0]


def test_forgetting_stops_at_its_bound() -> None:
    assert float(gs_lora.forget(torch.tensor(0.3), 1.0)) == pytest.approx(0.7) and float(gs_lora.forget(torch.tensor(1.2), 1.0)) == 0


def test_groups_are_the_feed_forwards_of_blocks() -> None:
    eraser = GSLoRA.from_config(QUICK).fit(sd1(), [CONCEPT], run=Run(progress=False))
    groups = gs_lora.groups_of(eraser.factors)
    assert all(".ff.net." in name for name in eraser.factors) and all(len(group) == 4 for group in groups)


def test_a_group_ends_at_zero_where_its_loss_pulls_less_than_alpha() -> None:
    """Of Σ ½‖w - c‖² + α Σ ‖w‖ the minimum is known: c (1 - α/‖c‖), or zero; Adam's own length of steps must not change that."""
    pull = {"near": torch.full((16,), 0.5 / 4), "far": torch.full((16,), 2.0 / 4)}  # norms 0.5 and 2
    weights = {name: torch.ones(16) for name in pull}
    shrinking = gs_lora.Shrink(1.0, [["near"], ["far"]])
    train(
        weights, lambda step, draw: sum(0.5 * (weights[n] - pull[n]).square().sum() for n in pull) + torch.zeros(()),
        steps=3000, lr=5e-3, callbacks=[shrinking],
    )  # fmt: skip
    assert weights["near"].tolist() == [0.0] * 16
    assert weights["far"].tolist() == pytest.approx([0.25] * 16, rel=0.05)


def test_the_penalty_is_the_same_after_a_kill(tmp_path: Path) -> None:
    def trained(folder: Path | None, killed: bool = False) -> list[float]:
        weights = {"a": torch.linspace(0.1, 1.0, 8), "b": torch.linspace(1.0, 2.0, 8)}

        def loss(step: int, draw: torch.Generator) -> torch.Tensor:
            if killed and step == 5:
                raise KeyboardInterrupt
            return sum(((w - torch.rand(8, generator=draw)) ** 2).sum() for w in weights.values()) + torch.zeros(())

        penalty = gs_lora.Shrink(0.5, [["a"], ["b"]])
        train(weights, loss, steps=8, lr=0.01, checkpoint=folder, save_every=2, callbacks=[penalty])
        return [value for weight in weights.values() for value in weight.tolist()]

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, killed=True)
    assert trained(tmp_path) == trained(None)


def test_some_blocks_go_and_others_stay_by_the_size_of_their_gradients() -> None:
    def norms(**settings: Any) -> list[float]:
        eraser = GSLoRA.from_config({**QUICK, "steps": 30, "bound": 5.0, **settings}).fit(sd1(), [CONCEPT], run=Run(progress=False))
        tensors = eraser.factors
        found = [float(gs_lora.group_lasso([[tensors[name] for name in group]])) for group in gs_lora.groups_of(tensors)]
        zeros = sum(not any(tensors[name].any() for name in group) for group in gs_lora.groups_of(tensors))
        assert eraser.details() == {"Blocks": {"feed-forwards": {"all": len(found), "left alone": zeros}}}
        return found

    free, some, term = norms(alpha=0.0), norms(alpha=3e-3), norms(alpha=3e-3, penalty="loss")
    assert min(free) > 1
    assert 0 < some.count(0.0) < len(some), some
    assert all(0 < with_term < without for with_term, without in zip(term, free, strict=True))


def test_a_strong_penalty_leaves_blocks_exactly_alone() -> None:
    pipe = sd1()
    loose = GSLoRA.from_config({**QUICK, "alpha": 0.0, "steps": 4}).fit(pipe, [CONCEPT], run=Run(progress=False))
    with pytest.raises(ErasureError, match="zero"):
        GSLoRA.from_config({**QUICK, "alpha": 1e4, "steps": 4}).fit(pipe, [CONCEPT], run=Run(progress=False))
    assert all(tensor.any() for tensor in loose.factors.values())


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_tasks_follow_one_another_and_their_loras_add_up(family: str) -> None:
    """The second task's part alone is what it would be on a base that has the first one's change in its weights."""
    pipe = FAMILIES[family]()
    second = Concept("cat", anchors=("dog",))
    both = GSLoRA.from_config(QUICK).fit(pipe, [CONCEPT, second], run=Run(progress=False))
    first = GSLoRA.from_config(QUICK).fit(pipe, [CONCEPT], run=Run(progress=False))
    assert {len(t) for name, t in both.factors.items() if "lora_A" in name} == {4}
    for name, tensor in first.factors.items():
        mine = both.factors[name][:2] if "lora_A" in name else both.factors[name][:, :2]
        assert torch.equal(mine, tensor), name
    alone = GSLoRA.from_config(QUICK).fit(pipe, [second], run=Run(progress=False))
    assert any(not torch.equal(both.factors[name][:, 2:], tensor) for name, tensor in alone.factors.items() if "lora_B" in name)


def test_what_one_task_erases_no_other_may_retain() -> None:
    later = Concept("cat", anchors=("dog",), retain=(CONCEPT.targets[0],))
    with pytest.raises(ErasureError, match="training would pull both ways"):
        GSLoRA.from_config(QUICK).fit(sd1(), [CONCEPT, later], run=Run(progress=False))
    with pytest.raises(ErasureError, match="no concept"):
        GSLoRA.from_config(QUICK).fit(sd1(), [], run=Run(progress=False))


def test_layers_of_a_users_choice_are_groups_of_their_own() -> None:
    names = [f"unet.a.to_q.lora_{side}.weight" for side in "AB"] + [f"unet.b.to_q.lora_{side}.weight" for side in "AB"]
    assert gs_lora.groups_of(names) == [names[:2], names[2:]]


@pytest.mark.parametrize("wrong", [{"bound": 0.0}, {"beta": 0.0}, {"alpha": -1.0}, {"layers": ("nowhere",)}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ErasureError):
        GSLoRA.from_config({**QUICK, **wrong}).fit(sd1(), [CONCEPT], run=Run(progress=False))
