"""Sparse coders: formulas against dense float64 references, files, and a training that resumes to the same weights."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.methods.sae import SparseCoder, SparseCoderConfig, abstopk, topk
from erasure.methods.sae.training import auxiliary, fit, fvu, geometric_median, orthogonal


def coder(activation: str = "topk", d: int = 6, n: int = 20, k: int = 3) -> SparseCoder:
    torch.manual_seed(0)
    made = SparseCoder(SparseCoderConfig(d_in=d, num_latents=n, k=k, activation=activation)).double()  # type: ignore[arg-type]
    with torch.no_grad():
        made.b_dec.normal_()
        made.encoder.bias.normal_()
        made.W_dec.copy_(torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64), dim=-1))
    return made


@pytest.mark.parametrize("activation", ["topk", "abstopk", "relu"])
def test_codes_and_reconstruction_are_the_papers(activation: str) -> None:
    made, x = coder(activation), torch.randn(5, 7, 6, dtype=torch.float64)
    codes, state = made.encode(x), made.state_dict()
    for i in range(5):
        for j in range(7):
            pre = state["encoder.weight"] @ (x[i, j] - state["b_dec"]) + state["encoder.bias"]
            order = sorted(range(20), key=lambda f: -(abs(pre[f]) if activation == "abstopk" else pre[f]))
            kept = range(20) if activation == "relu" else order[:3]
            wanted = torch.zeros(20, dtype=torch.float64)
            for f in kept:
                wanted[f] = pre[f] if activation == "abstopk" else max(pre[f], 0)
            torch.testing.assert_close(codes[i, j], wanted)
            torch.testing.assert_close(made.decode(codes[i, j]), state["W_dec"].T @ wanted + state["b_dec"])


def test_topk_cuts_negative_latents_and_abstopk_keeps_their_sign() -> None:
    pre = torch.tensor([3.0, -4.0, 1.0, -0.5])
    assert topk(pre, 3).tolist() == [3.0, 0.0, 1.0, 0.0]
    assert abstopk(pre, 2).tolist() == [3.0, -4.0, 0.0, 0.0]
    assert topk(-pre.abs(), 2).tolist() == [0.0] * 4


def test_auxiliary_loss_is_not_there_without_dead_latents_and_trains_none_but_the_dead() -> None:
    made, x = coder(), torch.randn(30, 6, dtype=torch.float64)
    out = made(x)
    none = torch.zeros(20, dtype=torch.bool)
    assert auxiliary(made, x, out.reconstruction, out.pre, none) is None
    dead = none.clone()
    dead[[2, 5]] = True
    loss = auxiliary(made, x, out.reconstruction, out.pre, dead)
    assert loss is not None
    residual, codes = (x - out.reconstruction).detach(), torch.zeros_like(out.pre)
    codes[:, [2, 5]] = out.pre[:, [2, 5]].clamp(min=0)  # fewer than half the width: all of them
    wanted = (residual - codes @ made.W_dec).square().sum() / (residual - residual.mean(0)).square().sum() * (2 / 3)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert made.W_dec.grad is not None
    assert (made.W_dec.grad[~dead] == 0).all() and (made.W_dec.grad[dead] != 0).any()


def test_small_formulas() -> None:
    x = torch.randn(40, 3, dtype=torch.float64)
    assert float(fvu(x, x)) == 0 and float(fvu(x, x.mean(0).expand_as(x))) == pytest.approx(1)
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [100.0, 0.0]], dtype=torch.float64)
    assert geometric_median(line, 2000)[0] == pytest.approx(1.0, abs=0.05)  # a mean would be 33.7
    directions = torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=-1)
    left = orthogonal(torch.randn(5, 3, dtype=torch.float64), directions)
    assert (left * directions).sum(-1).abs().max() < 1e-12


def reading(generator: torch.Generator) -> Tensor:
    """Sparse mixtures of eight fixed directions."""
    basis = torch.nn.functional.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(9)), dim=-1)
    weights = torch.rand(256, 8, generator=generator) * (torch.rand(256, 8, generator=generator) < 0.25)
    return weights @ basis


def test_training_explains_what_it_reads_and_a_killed_one_ends_with_the_same_weights(tmp_path: Path) -> None:
    config = SparseCoderConfig(d_in=16, num_latents=32, k=4)
    options = {"steps": 150, "lr": 1e-2, "dead_after": 2000, "progress": False}
    whole, measured = fit(reading, config, **options)  # type: ignore[arg-type]
    assert measured["explained"] > 0.85
    assert (whole.W_dec.norm(dim=-1) - 1).abs().max() < 1e-5
    calls = 0

    def killed(generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 122:
            raise KeyboardInterrupt
        return reading(generator)

    with pytest.raises(KeyboardInterrupt):
        fit(killed, config, checkpoint=tmp_path, **options)  # type: ignore[arg-type]
    resumed, _ = fit(reading, config, checkpoint=tmp_path, **options)  # type: ignore[arg-type]
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_files_round_trip_and_say_what_is_wrong(tmp_path: Path) -> None:
    made = coder().float()
    made.save(tmp_path / "coder")
    again = SparseCoder.load(tmp_path / "coder")
    assert again.config == made.config and all(torch.equal(v, again.state_dict()[n]) for n, v in made.state_dict().items())
    path = tmp_path / "coder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_latents": 21}))
    with pytest.raises(ErasureError, match="no folder of a sparse coder"):
        SparseCoder.load(tmp_path / "coder")
    with pytest.raises(ErasureError, match="made for activations 6 wide, these are 5"):
        made.encode(torch.randn(2, 5))
    with pytest.raises(ErasureError, match="a k of at most these"):
        SparseCoderConfig(d_in=4, num_latents=8, k=9)
