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


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_half_precision_is_reckoned_and_cut_in_float32_in_any_order(dtypes: tuple[torch.dtype, ...]) -> None:
    """In float16 the change itself would overflow, and a cut would lose a thousandth more than is said."""
    experts = [{key: (300 * tensor).to(dtype) for key, tensor in expert(i).items()} for i, dtype in enumerate(dtypes)]
    wanted = torch.stack([change({key: tensor.double() for key, tensor in e.items()}) for e in experts]).sum(0)
    for rank in (2, 4):
        merged, lost = merging.merge(experts, "sum", rank=rank)
        assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
        made = change({key: tensor.double() for key, tensor in merged.items()})
        assert float((made - wanted).norm() / wanted.norm()) == pytest.approx(lost, abs=1e-6) and (lost > 0.05) == (rank == 2)
    stacked, _ = merging.merge(experts, "sum")
    assert {tensor.dtype for tensor in stacked.values()} == {torch.promote_types(*dtypes)}
    torch.testing.assert_close(change({key: tensor.double() for key, tensor in stacked.items()}), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"rule": "sum"}, {"rule": "sum", "rank": 2}, {"rule": "ties"}, {"rule": "co-merge"}])
def test_scale_multiplies_the_change_of_every_rule(options: dict[str, Any]) -> None:
    wins = {LAYER: torch.tensor([[1.0, 0.0, 2.0, 0.0, 5.0, 1.0], [0.0, 1.0, 2.0, 3.0, 0.0, 0.0]])}
    for experts in ([expert(0), expert(1)], [expert(0)]):
        (plain, lost), (scaled, less) = (merging.merge(experts, wins=wins, scale=scale, **options) for scale in (1.0, 2.5))
        torch.testing.assert_close(change(scaled), 2.5 * change(plain), atol=1e-9, rtol=1e-9)
        assert lost == pytest.approx(less, rel=1e-6)


def test_a_sum_is_the_average_times_the_experts_cut_or_not() -> None:
    experts = [expert(0), expert(1), expert(2)]
    for rank in (None, 3):
        (total, lost), (mean, less) = (merging.merge(experts, rule, rank=rank) for rule in ("sum", "average"))
        torch.testing.assert_close(change(total), 3 * change(mean), atol=1e-5, rtol=1e-5)
        assert lost == pytest.approx(less, rel=1e-5) and (lost > 0.01) == (rank is not None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("rule", ["average", "sum", "ties", "co-merge"])
def test_one_expert_comes_back_as_it_is(rule: Any, dtype: torch.dtype) -> None:
    one = {name: tensor.to(dtype) for name, tensor in expert(0).items()}
    merged, lost = merging.merge([one], rule, density=1.0)
    assert lost == 0 and all(torch.equal(merged[name], tensor) for name, tensor in one.items())


@pytest.mark.parametrize("density", [0.01, 0.2, 0.24, 0.5, 1.0])
def test_ties_is_trim_elect_and_disjoint_mean(density: float) -> None:
    deltas = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    by_hand = torch.zeros(20, dtype=torch.float64)
    kept = []
    for each in deltas.flatten(1):
        bar = sorted(each.abs().tolist(), reverse=True)[max(int(density * 20), 1) - 1]
        kept.append([v if abs(v) >= bar else 0.0 for v in each.tolist()])
    for place in range(20):
        column = [row[place] for row in kept]
        sign = (sum(column) > 0) - (sum(column) < 0)
        same = [v for v in column if v * sign > 0]
        by_hand[place] = sum(same) / len(same) if same else 0.0
    torch.testing.assert_close(merging.ties(deltas, density), by_hand.view(4, 5), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("experts", "merged"),
    [
        ([[1.0, 2.0, -3.0, 4.0], [-1.0, 2.0, 3.0, -4.0]], [1.0, 2.0, 3.0, 4.0]),
        ([[1.0, -2.0, 3.0, 4.0], [-1.0, 2.0, 3.0, 4.0]], [1.0, 2.0, 3.0, 4.0]),
        ([[1.0, -2.0, -3.0], [-1.0, -2.0, 3.0]], [-1.0, -2.0, -3.0]),
        ([[1.0, -2.0], [-1.0, 2.0]], [-1.0, -2.0]),
    ],
)
def test_an_election_without_a_winner_takes_the_sign_of_most_entries(experts: Any, merged: Any) -> None:
    """As in the released code, where negative entries are kept if neither sign has more."""
    assert merging.ties(torch.tensor(experts)).tolist() == merged


@pytest.mark.parametrize(
    ("trim", "large", "small"),
    [("vector", [[5.0, 6.0], [-9.0, 8.0]], [[0.0, 0.0]]), ("layer", [[0.0, 6.0], [-9.0, 8.0]], [[0.0, 3.0]])],
)
def test_a_vector_is_trimmed_as_one_and_layers_apart(trim: Any, large: Any, small: Any) -> None:
    """Of half of six entries, none of the small layer's is left. The sum of -6 and 6 is decided by the signs of the rest."""
    values = [([[5.0, -6.0], [7.0, 8.0]], [[1.0, 2.0]]), ([[5.0, 6.0], [-9.0, 0.0]], [[3.0, 4.0]])]
    names = ("unet.large", "unet.small")
    experts = [
        {
            f"{name}.lora_{side}.weight": t
            for name, v in zip(names, each, strict=True)
            for side, t in (("B", torch.tensor(v)), ("A", torch.eye(2)))
        }
        for each in values
    ]
    merged, _ = merging.merge(experts, "ties", density=0.5, trim=trim)
    for name, wanted in zip(names, (large, small), strict=True):
        torch.testing.assert_close(change(merged, name), torch.tensor(wanted), atol=1e-5, rtol=0)


def test_co_merge_takes_rows_from_their_winners_and_averages_ties() -> None:
    deltas = torch.randn(2, 3, 4, dtype=torch.float64)
    merged = merging.co_merge(deltas, torch.tensor([[5.0, 1.0, 2.0], [0.0, 4.0, 2.0]]))
    expected = torch.stack([deltas[0, 0], deltas[1, 1], (deltas[0, 2] + deltas[1, 2]) / 2])
    torch.testing.assert_close(merged, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_more_wins_than_half_precision_can_count_are_no_tie(dtype: torch.dtype) -> None:
    experts = [{key: tensor.to(dtype) for key, tensor in expert(i).items()} for i in (0, 1)]
    merged, _ = merging.merge(experts, "co-merge", wins={LAYER: torch.tensor([[4800.0] * 6, [4801.0] * 6])})
    wanted = change({key: tensor.float() for key, tensor in experts[1].items()})
    torch.testing.assert_close(change(merged), wanted, atol=1e-5, rtol=1e-5)


CONV = "unet.down_blocks.0.downsamplers.0.conv"


def convolution(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sides = {"A": torch.randn(3, 16, 3, 3, generator=draw), "B": size * torch.randn(16, 3, 1, 1, generator=draw)}
    return {f"{CONV}.lora_{side}.weight": tensor for side, tensor in sides.items()}


def kernel(factors: Any) -> Tensor:
    return torch.einsum("orxy,rihw->oihw", *(factors[f"{CONV}.lora_{side}.weight"] for side in "BA"))


@pytest.mark.parametrize("options", [{}, {"rank": 9}, {"rule": "sum", "rank": 9}, {"rule": "ties", "density": 0.4}, {"rule": "co-merge"}])
def test_convolutions_are_merged_by_every_rule(options: dict[str, Any]) -> None:
    experts = [convolution(i) for i in range(3)]
    wins = torch.randint(5, (3, 16), generator=torch.Generator().manual_seed(0))
    merged, lost = merging.merge(experts, wins={CONV: wins}, **options)
    kernels = torch.stack([kernel(e) for e in experts])
    rules = {
        "average": kernels.mean(0),
        "sum": kernels.sum(0),
        "ties": merging.ties(kernels, 0.4),
        "co-merge": merging.co_merge(kernels, wins),
    }
    torch.testing.assert_close(kernel(merged), rules[options.get("rule", "average")], atol=1e-5, rtol=1e-5)
    assert lost < 1e-6 and merged[f"{CONV}.lora_A.weight"].shape[1:] == (16, 3, 3)
    assert merged[f"{CONV}.lora_B.weight"].shape[2:] == (1, 1)


def test_wins_of_a_convolution_are_counted_with_its_stride_and_padding() -> None:
    pipe = sd1()
    pipe.set_progress_bar_config(disable=True)
    wins = merging.count_wins(pipe, [convolution(0), convolution(1, size=1e4)], ["a cat"], steps=2, height=16, width=16)[CONV]
    assert float(wins[0].sum()) == 0 and float(wins[1].min()) > 0
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    pair = {side: convolution(0)[f"{CONV}.lora_{side}.weight"] for side in "AB"}
    moved = torch.nn.functional.conv2d(x, kernel(convolution(0)), stride=2, padding=1)
    assert moved.shape == (2, 16, 4, 4)
    (found,) = merging.activations([pair], x, stride=2, padding=1)
    torch.testing.assert_close(found, moved.abs().mean((2, 3)), atol=1e-4, rtol=1e-4)


def test_two_spellings_of_a_text_encoders_layer_are_one() -> None:
    """As transformers 4 and 5 name it; files have the former."""
    layer = "encoder.layers.0.self_attn.q_proj"
    old, new = f"text_encoder.text_model.{layer}", f"text_encoder.{layer}"
    experts = [expert(0, layer=old), expert(1, layer=new)]
    merged, _ = merging.merge(experts, "sum")
    assert merged.keys() == experts[0].keys()
    torch.testing.assert_close(change(merged, old), change(experts[0], old) + change(experts[1], new), atol=1e-12, rtol=0)


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
        ([{}], {}, "at least one"),
        ([expert(0), expert(1, shape=(6, 4))], {}, "different shapes"),
        ([expert(0), expert(1)], {"rule": "ties", "density": 0.0}, "density is 0"),
        ([expert(0), expert(1)], {"rank": 0}, "rank is 0"),
        ([expert(0), expert(1)], {"rule": "co-merge"}, "needs calibration"),
        ([expert(0), expert(1)], {"rule": "co-merge", "wins": {"unet.other": torch.ones(2, 6)}}, f"has none of {LAYER}"),
        ([expert(0), expert(1)], {"rule": "mean"}, "rule is 'mean'; choose one of average, sum, ties, co-merge"),
        ([expert(0), expert(1)], {"rule": "ties", "trim": "all"}, "trim is 'all'; choose one of layer, vector"),
        ([expert(0), expert(1)], {"scale": 0.0}, "scale is 0"),
        ([expert(0), expert(1)], {"scale": float("inf")}, "scale is inf"),
        ([expert(0), dict(list(expert(1).items())[:1])], {}, f"{LAYER} of expert 2 is no pair"),
        ([expert(0) | dict(list(expert(0, rank=3).items())[:1])], {}, f"{LAYER} of expert 1 is no pair"),
        ([convolution(0), {key: tensor[..., :1, :1] for key, tensor in convolution(1).items()}], {}, "different shapes"),
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
