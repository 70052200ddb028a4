"""Merging of LoRA experts: exact averages, TIES and co-merge by hand, and one expert that comes back as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure import merging
from erasure.errors import ErasureError
from erasure.testing.tiny import sd1

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def expert(seed: int, rank: int = 2, layer: str = LAYER, shape: tuple[int, int] = (6, 5)) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{layer}.lora_A.weight": torch.randn(rank, shape[1], generator=draw, dtype=torch.float64),
        f"{layer}.lora_B.weight": torch.randn(shape[0], rank, generator=draw, dtype=torch.float64),
    }


def change(factors: Any, layer: str = LAYER) -> Tensor:
    product: Tensor = factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]
    return product


def test_the_average_is_exact_and_its_rank_the_sum() -> None:
    experts = [expert(0), expert(1, rank=3), expert(2)]
    merged, lost = merging.merge(experts)
    torch.testing.assert_close(change(merged), sum(change(e) for e in experts) / 3, atol=1e-12, rtol=0)
    assert lost == 0 and len(merged[f"{LAYER}.lora_A.weight"]) == 7


def test_a_cut_average_loses_what_the_singular_values_beyond_the_rank_say() -> None:
    experts = [expert(0), expert(1)]
    merged, lost = merging.merge(experts, rank=2)
    values = torch.linalg.svdvals(sum(change(e) for e in experts) / 2)
    assert lost == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-6) and lost > 0.05
    assert len(merged[f"{LAYER}.lora_A.weight"]) == 2


def test_a_sum_is_the_average_times_the_experts_cut_or_not() -> None:
    experts = [expert(0), expert(1), expert(2)]
    for rank in (None, 3):
        (total, lost), (mean, less) = (merging.merge(experts, rule, rank=rank) for rule in ("sum", "average"))
        torch.testing.assert_close(change(total), 3 * change(mean), atol=1e-5, rtol=1e-5)
        assert lost == pytest.approx(less, rel=1e-5) and (lost > 0.01) == (rank is not None)


@pytest.mark.parametrize("rule", ["average", "sum", "ties", "co-merge"])
def test_one_expert_comes_back_as_it_is(rule: Any) -> None:
    one = expert(0)
    merged, lost = merging.merge([one], rule, density=1.0)
    assert lost == 0 and all(torch.equal(merged[name], tensor) for name, tensor in one.items())


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_trim_elect_and_disjoint_mean(density: float) -> None:
    deltas = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    by_hand = torch.zeros(20, dtype=torch.float64)
    kept = []
    for each in deltas.flatten(1):
        bar = sorted(each.abs().tolist(), reverse=True)[round(density * 20) - 1]
        kept.append([v if abs(v) >= bar else 0.0 for v in each.tolist()])
    for place in range(20):
        column = [row[place] for row in kept]
        sign = (sum(column) > 0) - (sum(column) < 0)
        same = [v for v in column if v * sign > 0]
        by_hand[place] = sum(same) / len(same) if same else 0.0
    torch.testing.assert_close(merging.ties(deltas, density), by_hand.view(4, 5), atol=1e-12, rtol=0)


def test_co_merge_takes_rows_from_their_winners_and_averages_ties() -> None:
    deltas = torch.randn(2, 3, 4, dtype=torch.float64)
    merged = merging.co_merge(deltas, torch.tensor([[5.0, 1.0, 2.0], [0.0, 4.0, 2.0]]))
    expected = torch.stack([deltas[0, 0], deltas[1, 1], (deltas[0, 2] + deltas[1, 2]) / 2])
    torch.testing.assert_close(merged, expected, atol=1e-12, rtol=0)


def test_wins_are_counted_on_the_pipelines_own_inputs() -> None:
    """An expert a hundred times as strong wins every output of every call."""
    pipe = sd1()
    pipe.set_progress_bar_config(disable=True)
    module = pipe.unet.get_submodule(LAYER.removeprefix("unet."))
    shape = (module.out_features, module.in_features)
    weak, strong = ({k: v.float() for k, v in expert(seed, shape=shape).items()} for seed in (0, 1))
    strong[f"{LAYER}.lora_B.weight"] = strong[f"{LAYER}.lora_B.weight"] * 1e4
    before = len(module._forward_pre_hooks)
    wins = merging.count_wins(pipe, [weak, strong], ["a cat"], steps=2, height=16, width=16)[LAYER]
    assert wins.shape == (2, shape[0]) and float(wins[0].sum()) == 0 and float(wins[1].min()) > 0
    assert len(module._forward_pre_hooks) == before
    merged, _ = merging.merge([weak, strong], "co-merge", wins={LAYER: wins})
    torch.testing.assert_close(change(merged), change(strong), rtol=1e-4, atol=1e-2)


def test_a_layer_without_change_is_merged_to_none() -> None:
    idle = expert(0)
    idle[f"{LAYER}.lora_B.weight"] = torch.zeros_like(idle[f"{LAYER}.lora_B.weight"])
    merged, lost = merging.merge([idle, idle], "ties", density=1.0)
    assert not change(merged).any() and lost == 0


@pytest.mark.parametrize(
    ("experts", "options", "said"),
    [
        ([], {}, "at least one"),
        ([expert(0), expert(1, shape=(6, 4))], {}, "different shapes"),
        ([expert(0), expert(1)], {"rule": "ties", "density": 0.0}, "density is 0"),
        ([expert(0), expert(1)], {"rank": 0}, "rank is 0"),
        ([expert(0), expert(1)], {"rule": "co-merge"}, "needs calibration"),
    ],
)
def test_what_cannot_be_merged_is_said(experts: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ErasureError, match=said):
        merging.merge(experts, **options)


def test_the_command_merges_two_experts_and_plain_diffusers_loads_the_file(tmp_path: Path) -> None:
    """The merged artefact verifies on its base, and its file changes what plain diffusers draws."""
    from erasure import artifact
    from erasure.canvas.concepts import canvas_concept
    from erasure.cli.main import main
    from erasure.method import Run
    from erasure.methods.safety_dpo import SafetyDPO
    from erasure.models import load_base

    pipe = load_base("canvas", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    quick: dict[str, Any] = {"preset": "canvas", "detector": "", "images": 2, "batch": 1, "sampling_steps": 2, "steps": 2, "lr": 0.05}
    for name in ("dagger", "cat"):
        eraser = SafetyDPO.from_config(quick).fit(pipe, [canvas_concept(name)], run=Run(progress=False))
        artifact.save(eraser, tmp_path / name, pipe=pipe, base_id="canvas")
    given = [str(tmp_path / "dagger"), str(tmp_path / "cat"), "--model", "canvas"]
    assert main(["merge", *given, "--out", str(tmp_path / "both")]) == 0
    assert main(["merge", *given, "--rule", "ties", "--rank", "4", "--out", str(tmp_path / "ties"), "--json"]) == 0
    both, _ = artifact.check(tmp_path / "both", pipe)
    config = artifact.read_config(tmp_path / "both")
    assert [c.name for c in both.concepts] == ["dagger", "cat"] and config["details"]["Merging"]["merged"]["experts"] == 2

    def drawn() -> Tensor:
        images = pipe("a dagger", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        return torch.as_tensor(images)

    plain = drawn()
    with both.attach(pipe):
        attached = drawn()
    pipe.load_lora_weights(tmp_path / "both")
    assert (drawn() - plain).abs().max() > 0.01
    torch.testing.assert_close(drawn(), attached, atol=1e-4, rtol=1e-3)
    assert main(["merge", *given, "--rule", "ties", "--density", "0", "--out", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()
