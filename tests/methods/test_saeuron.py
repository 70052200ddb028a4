"""SAeUron against its paper written out patch by patch in float64, and inside the sampling loops of UNet families."""

import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure import artifact
from erasure.concept import Concept
from erasure.errors import ErasureError, NotErased
from erasure.method import Run
from erasure.methods import saeuron
from erasure.methods.sae.coder import SparseCoder
from erasure.methods.saeuron import SAeUron, SAeUronEraser
from erasure.methods.saeuron.reading import activations, contrast, retained
from erasure.methods.saeuron.training import reader
from erasure.testing import check_method
from erasure.testing.subject import CONCEPT, TARGET, change, given_embeds, state, trace
from tests.stand_ins import UNET_BLOCK, unet_coder
from tests.tiny import FAMILIES, latents, sd1

WIDTH, LATENTS = 32, 64
QUICK = {"images": 1, "steps": 2, "percentile": 80.0, "factor": -20.0}
UNETS = ("sd1", "sd2", "sdxl")


@pytest.fixture
def sae() -> str:
    return unet_coder()


def fitted(pipe: Any, sae: str, *concepts: Concept, **config: Any) -> SAeUronEraser:
    return SAeUron.from_config(QUICK | {"sae": sae} | config).fit(pipe, concepts or [CONCEPT], run=Run(progress=False))


@contextmanager
def recorded(pipe: Any) -> Iterator[list[tuple[float, Tensor]]]:
    """Timestep and output of the block at each call: as the eraser gets it if opened before one, as it leaves it if after."""
    calls: list[tuple[float, Tensor]] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        calls.append((float(args[1] if len(args) > 1 else kwargs["timestep"]), torch.zeros(0)))

    def after(module: Any, args: Any, output: Any) -> None:
        calls[-1] = (calls[-1][0], output[0].clone())

    block = pipe.unet.get_submodule(UNET_BLOCK.removeprefix("unet."))
    hooks = pipe.unet.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


# the formulas


def test_score_is_a_difference_of_shares() -> None:
    target, others = torch.tensor([[6.0, 3.0, 1.0], [0.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 2.0], [0.0, 4.0, 0.0]])
    wanted = torch.tensor([[0.35, 0.05, -0.4], [0.0, -1.0, 0.0]])
    assert torch.allclose(saeuron.score(target, others), wanted), "where nothing fires a share is 0, not NaN"
    assert torch.allclose(saeuron.score(10 * target, others), wanted), "shares have no unit"


def test_a_percentile_chooses_that_many_features_at_each_timestep() -> None:
    scores = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for percentile, n in ((99.9, 2), (99.5, 10), (95.0, 100), (100.0, 0)):
        chosen = saeuron.choose(scores, percentile)
        assert chosen.sum(-1).tolist() == [n] * 3
        assert n == 0 or all(scores[t][chosen[t]].min() > scores[t][~chosen[t]].max() for t in range(3))
    assert saeuron.choose(-scores.abs(), 50.0).sum() == 0, "what fires more for the others is never chosen"


def by_hand(x: Tensor, coder: SparseCoder, chosen: Tensor, threshold: Tensor, mean: Tensor, factor: float, rule: str) -> Tensor:
    """x + W_dec (z' - z) for patches [n, d], one patch and one feature at a time in Python floats."""
    encoder, bias, decoder, centre = (t.double() for t in (coder.encoder.weight, coder.encoder.bias, coder.W_dec, coder.b_dec))
    out = x.double().clone()
    for p in range(len(x)):
        pre = encoder @ (x[p].double() - centre) + bias
        largest = sorted(range(len(pre)), key=lambda i: -float(pre[i]))[: coder.config.k]
        for i in largest:
            z = max(float(pre[i]), 0.0)
            if bool(chosen[i]) and z > float(threshold[i]):
                new = {"paper": z * factor * float(mean[i]), "scale": factor * z, "mean": factor * float(mean[i])}[rule]
                out[p] += (new - z) * decoder[i]
    return out


@pytest.mark.parametrize("rule", ["paper", "scale", "mean"])
def test_every_rule_equals_the_paper_patch_by_patch(sae: str, rule: Any) -> None:
    draw = torch.Generator().manual_seed(2)
    coder = SparseCoder.load(sae).double()
    x = torch.randn(12, WIDTH, generator=draw, dtype=torch.float64)
    chosen, threshold, mean = (
        torch.rand(LATENTS, generator=draw) < 0.5,
        0.6 * torch.rand(LATENTS, generator=draw).double(),
        torch.rand(LATENTS),
    )
    codes = coder.encode(x)
    ablated = saeuron.ablate(codes, chosen, threshold, mean.double(), -3.0, rule)
    wanted = by_hand(x, coder, chosen, threshold, mean, -3.0, rule)
    assert (saeuron.deactivate(x, codes, ablated, coder.W_dec) - wanted).abs().max() < 1e-12
    below = (codes <= threshold) | ~chosen
    assert torch.equal(ablated[below], codes[below]) and 5 < (~below & (codes > 0)).sum() < codes.count_nonzero()


def test_the_residual_has_the_right_sign(sae: str) -> None:
    """With nothing ablated x stays x; the released code would give 2 x̂ - x."""
    coder, x = SparseCoder.load(sae), torch.randn(5, WIDTH)
    codes, off = coder.encode(x), torch.zeros(LATENTS)
    assert torch.equal(saeuron.deactivate(x, codes, saeuron.ablate(codes, off.bool(), off, off, -3.0), coder.W_dec), x)
    assert (coder.decode(codes) - x).norm() / x.norm() > 0.1, "this coder is far from exact, so that the sign would show"


# inside pipelines


@pytest.mark.parametrize("branches", ["both", "text"])
@pytest.mark.parametrize("name", UNETS)
def test_the_block_gives_what_the_paper_says_at_every_timestep(name: str, branches: str, sae: str) -> None:
    pipe = FAMILIES[name]().to(torch.float64)
    eraser = fitted(pipe, sae, branches=branches)
    with recorded(pipe) as before, eraser.attach(pipe), recorded(pipe) as after:
        latents(pipe, [TARGET, "a big red cat"], seed=[1, 2], steps=3)
    table, edited = eraser.table, 0.0
    for (t, x), (_, y) in zip(before, after, strict=True):
        row = min(range(len(table.timesteps)), key=lambda i: abs(float(table.timesteps[i]) - t))
        chosen, threshold, mean = torch.zeros(LATENTS, dtype=torch.bool), torch.zeros(LATENTS), torch.zeros(LATENTS)
        chosen[table.features], threshold[table.features], mean[table.features] = table.chosen[row], table.threshold[row], table.mean[row]
        tokens = x.flatten(2).mT.reshape(-1, WIDTH)
        wanted = (
            by_hand(tokens, eraser.coder.double(), chosen, threshold, mean, -20.0, "scale").reshape(len(x), -1, WIDTH).mT.reshape(x.shape)
        )
        if branches == "text":
            wanted[:2] = x[:2]
            assert torch.equal(y[:2], x[:2]), "the unconditional side stays, bit by bit"
        assert (y - wanted).abs().max() < 1e-9
        edited += float((y - x).abs().max())
    assert len(before) == 3 and edited > 0.1


def test_means_and_table_are_those_of_the_base(sae: str) -> None:
    """Statistics from images that the pipeline draws by its own call, image by image."""
    pipe, coder = sd1(), SparseCoder.load(sae)
    eraser = fitted(pipe, sae, images=2)
    means = []
    for seed, texts in ((0, ["dagger", "knife"]), (10_000, ["boat", "a picture of boat"])):
        with recorded(pipe) as calls:
            for i, text in enumerate(texts):
                latents(pipe, text, seed=seed + i, steps=2, guidance_scale=5.0)
        codes = [coder.encode(x[1:].flatten(2).mT).mean((0, 1)) for _, x in calls]
        means.append(torch.stack([(codes[0] + codes[2]) / 2, (codes[1] + codes[3]) / 2]))
        assert eraser.table.timesteps.tolist() == [t for t, _ in calls[:2]]
    target, others = means
    chosen = saeuron.choose(saeuron.score(target, others), 80.0)
    features = chosen.any(0).nonzero()[:, 0]
    assert torch.equal(eraser.table.features, features) and torch.equal(eraser.table.chosen, chosen[:, features])
    assert torch.allclose(eraser.table.threshold, (target + others)[:, features] / 2, atol=1e-6), "a concept and one retained phrase"
    assert torch.allclose(eraser.table.mean, (target * chosen)[:, features], atol=1e-6)


def test_any_number_of_steps_and_any_number_of_runs(sae: str) -> None:
    pipe = sd1()
    eraser = fitted(pipe, sae)
    first, last = eraser.table.timesteps.tolist()
    assert [eraser.table.nearest(t) for t in (999, first, last + 1, 0)] == [0, 0, 1, 1]
    for steps in (1, 2, 7):
        base = latents(pipe, TARGET, steps=steps)
        with eraser.attach(pipe):
            once = latents(pipe, TARGET, steps=steps)
            latents(pipe, "a big red cat", steps=3)
            assert torch.equal(latents(pipe, TARGET, steps=steps), once), "nothing is counted from one run to the next"
        assert change(once, base) > 0.02


def test_embeddings_are_erased_too_and_text_alone_refuses_them(sae: str) -> None:
    pipe = sd1()
    given, base = given_embeds(pipe, TARGET), latents(pipe, TARGET)
    with fitted(pipe, sae).attach(pipe):
        as_text = latents(pipe, TARGET)
        assert torch.equal(latents(pipe, None, **given), as_text) and change(as_text, base) > 0.02  # type: ignore[arg-type]
    with fitted(pipe, sae, branches="text").attach(pipe), pytest.raises(NotErased, match="prompt_embeds"):
        latents(pipe, None, **given)  # type: ignore[arg-type]


def test_several_concepts_are_a_union_with_the_largest_mean(caplog: pytest.LogCaptureFixture) -> None:
    method = SAeUron(percentile=50.0)
    targets, others = torch.tensor([[[9.0, 1.0, 0.0, 0.0]], [[4.0, 0.0, 6.0, 0.0]]]), torch.tensor([[0.0, 1.0, 0.0, 3.0]])
    chosen = saeuron.choose(saeuron.score(targets, others), 50.0)
    table = method.table(torch.tensor([500.0]), targets, chosen, others, weight=2)
    assert table.features.tolist() == [0, 2] and table.mean.tolist() == [[9.0, 6.0]]
    assert table.threshold.tolist() == [[13 / 4, 6 / 4]], "the mean over two concepts and two retained phrases"
    assert not caplog.records


def test_its_artefact_stands_alone(tmp_path: Path) -> None:
    pipe = sd1()
    folder = str(shutil.copytree(unet_coder(), tmp_path / "sae"))
    eraser = fitted(pipe, folder)
    with eraser.attach(pipe):
        erased = latents(pipe, TARGET)
    out = artifact.save(eraser, tmp_path / "out", pipe=pipe, base_id="tiny")
    shutil.rmtree(folder)
    again, _ = artifact.load_eraser(out)
    with again.attach(pipe):
        assert torch.equal(latents(pipe, TARGET), erased)
    kept = again.tensors()
    assert kept["coder.W_dec"].shape == (len(eraser.table.features), WIDTH), "of the decoder only what is needed"
    with pytest.raises(ErasureError, match="threshold is"):
        eraser.method.eraser(eraser.concepts, kept | {"threshold": kept["threshold"][:, 1:]})


@pytest.mark.parametrize("name", UNETS)
def test_contract(name: str, sae: str) -> None:
    assert check_method(SAeUron, families=[name], config=QUICK | {"sae": sae}) > 15


# what can be wrong


def test_a_wrong_hookpoint_width_or_folder_is_named(sae: str, tmp_path: Path) -> None:
    pipe = sd1()
    before, traces = state(pipe), trace(pipe)
    with pytest.raises(ErasureError, match=r"no hookpoint 'unet.up_blocks.9'; its cross-attention blocks are unet.down_blocks.0.att"):
        fitted(pipe, sae, hookpoint="unet.up_blocks.9")
    with pytest.raises(ErasureError, match=r"up_blocks.2.attentions.0 is 16 wide, and the autoencoder was made for 32$"):
        fitted(pipe, sae, hookpoint="unet.up_blocks.2.attentions.0")
    with pytest.raises(ErasureError, match=r"no hookpoint 'unet.up_blocks.0.att.*; the autoencoder that ships is the canvas's"):
        SAeUron().fit(pipe, [CONCEPT])
    with pytest.raises(ErasureError, match="no folder of a sparse coder"):
        fitted(pipe, str(tmp_path))
    assert trace(pipe)[1] == traces[1] and all(torch.equal(before[key], value) for key, value in state(pipe).items())


def test_no_feature_is_an_identity_that_says_so(sae: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe = sd1()
    base = latents(pipe, TARGET)
    with caplog.at_level(logging.WARNING, "erasure"):
        eraser = fitted(pipe, sae, percentile=100.0)
    assert "nothing is erased" in caplog.text and not len(eraser.table.features)
    with eraser.attach(pipe):
        assert torch.equal(latents(pipe, TARGET), base)


def test_a_concept_that_is_retained_or_looks_like_it_is_an_error(sae: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ErasureError, match="'Dagger', is a target too"):
        Concept("dagger", retain=("Dagger",))
    with caplog.at_level(logging.WARNING, "erasure"):
        kept = retained([Concept("dagger", retain=("boat", "Cat")), Concept("cat", retain=("dagger",))])
    assert kept == {"boat": "object"} and "so erased: Cat, dagger" in caplog.text
    blind = SparseCoder.load(sae)
    torch.nn.init.constant_(blind.encoder.bias, -1e6)
    blind.save(tmp_path / "blind")
    with pytest.raises(ErasureError, match=r"fires more for 'dagger' than for what is retained \(boat\)"):
        fitted(sd1(), str(tmp_path / "blind"))


@pytest.mark.parametrize("wrong", [{"percentile": 101.0}, {"percentile": math.nan}, {"images": 0}, {"steps": 0}, {"rule": "other"}])
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ErasureError, match=next(iter(wrong))):
        SAeUron.from_config(wrong)


# what fit reads


def test_contrast_holds_each_phrase_within_bounds() -> None:
    phrases = {f"thing {i}": "object" for i in range(10)}
    assert [sum(f"thing {i}" in text for text in contrast(phrases, 16)) for i in range(10)] == [2] * 6 + [1] * 4
    assert len(set(contrast(phrases, 16))) == 16, "twice in different templates"
    assert [text.rpartition(" ")[2] for text in contrast(phrases, 1)] == ["0", "2", "5", "7"], "at most four times as many, in even steps"
    assert len(contrast({}, 2)) == 8 and all(contrast({}, 2)), "of our neutral prompts"


def test_a_reader_draws_rows_of_the_block(sae: str) -> None:
    pipe = sd1()
    texts = [TARGET, "a big red cat"]
    read, width = reader(pipe, UNET_BLOCK, texts, batch=20, steps=2, patches=3, progress=False)
    x = read(torch.Generator().manual_seed(0))
    every = torch.cat([x.flatten(0, 1) for _, x in activations(pipe, SAeUron().family(pipe), UNET_BLOCK, texts, steps=2)]).half().float()
    assert width == WIDTH and x.shape == (20 * 3, WIDTH)
    assert torch.cdist(x, every).amin(1).max() < 1e-2 and len(x.unique(dim=0)) <= 2 * 2 * 3
    assert torch.equal(x, read(torch.Generator().manual_seed(0)))
