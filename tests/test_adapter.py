"""LoRA erasers: they really load, act beside the user's own adapters, cannot be switched off in silence, and leave no trace."""

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import erasure
from erasure import artifact, lora
from erasure.adapter import AdapterEraser
from erasure.concept import Concept
from erasure.errors import ArtifactError, Conflict, ErasureError, NotErased, NothingAttached
from erasure.lora import LORA
from erasure.method import Run
from erasure.methods.uce import UCE
from erasure.registry import Entry, methods
from tests import tiny
from tests.stand_ins import RandomLoRA
from tests.test_artifact import refused, rehash
from tests.tiny import latents, sd1

CONCEPT = Concept("dagger", anchors=("cat",))
PROMPT = "a photo of a dagger"


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.builtin, "random_lora", Entry("tests.stand_ins:RandomLoRA", "test"))


def fit(pipe: Any, seed: int = 0, **settings: Any) -> AdapterEraser:
    return RandomLoRA(**settings).fit(pipe, [CONCEPT], run=Run(seed=seed))


def state(pipe: Any) -> dict[str, torch.Tensor]:
    """Every tensor, and what else an adapter could leave behind."""
    parts = {name: module for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
    return {f"{part}.{key}": value.clone() for part, module in parts.items() for key, value in module.state_dict().items()}


def same(pipe: Any, before: dict[str, torch.Tensor]) -> bool:
    after = state(pipe)
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def folded(pipe: Any, eraser: AdapterEraser) -> Any:
    """A copy of the pipeline with B A added to the weights: what the adapter has to amount to."""
    copied = copy.deepcopy(pipe)
    for component, layers in lora.by_component(eraser.factors).items():
        module = getattr(copied, component)
        for name, pair in layers.items():
            with torch.no_grad():
                weight = module.get_submodule(lora.live_name(module, name)).weight
                weight += pair["B"].to(weight) @ pair["A"].to(weight)
    return copied


def users_lora(pipe: Any, name: str, layers: Sequence[str] = ("attn1.to_q", "attn2.to_q"), seed: int = 0) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(layers), init_lora_weights=False)
    torch.manual_seed(seed)
    pipe.unet.add_adapter(config, adapter_name=name)


@pytest.mark.parametrize("settings", [{}, {"encoders": True}, {"rank": 1}])
def test_it_equals_the_folded_weights_and_leaves_no_trace(settings: dict[str, Any]) -> None:
    pipe = sd1()
    base, before, attributes = latents(pipe, PROMPT), state(pipe), {name: set(vars(m)) for name, m in pipe.unet.named_modules()}
    grads = [p.requires_grad for p in pipe.unet.parameters()]
    eraser = fit(pipe, **settings)
    with eraser.attach(pipe):
        attached = latents(pipe, PROMPT)
    assert (attached - base).norm() > 0.05 * base.norm()
    torch.testing.assert_close(attached, latents(folded(pipe, eraser), PROMPT), rtol=1e-4, atol=1e-4)
    assert same(pipe, before) and torch.equal(latents(pipe, PROMPT), base)
    assert {name: set(vars(m)) for name, m in pipe.unet.named_modules()} == attributes
    assert [p.requires_grad for p in pipe.unet.parameters()] == grads and not pipe.get_list_adapters()
    assert not any(m._forward_pre_hooks for m in (*pipe.unet.modules(), *pipe.text_encoder.modules()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_takes_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    pipe = sd1().to(dtype)
    before = state(pipe)
    with fit(pipe, encoders=True).attach(pipe):
        assert {p.dtype for p in pipe.unet.parameters()} == {dtype} == {p.dtype for p in pipe.text_encoder.parameters()}
        assert latents(pipe, PROMPT).dtype == dtype
    assert same(pipe, before)


def test_it_acts_beside_the_users_loras_and_gives_them_back() -> None:
    pipe = sd1()
    users_lora(pipe, "mine", seed=1)
    users_lora(pipe, "idle", layers=("attn1.to_v",), seed=2)
    pipe.set_adapters(["mine"], [0.7])
    alone, before = latents(pipe, PROMPT), state(pipe)
    eraser = fit(pipe, encoders=True)
    with eraser.attach(pipe):
        both = latents(pipe, PROMPT)
        assert pipe.unet.active_adapters() == ["mine", "erasure_001"]
    assert same(pipe, before) and torch.equal(latents(pipe, PROMPT), alone)
    assert pipe.get_active_adapters() == ["mine"] and set(pipe.get_list_adapters()["unet"]) == {"mine", "idle"}
    pipe.fuse_lora(adapter_names=["mine"])
    pipe.unload_lora_weights()
    torch.testing.assert_close(both, latents(folded(pipe, eraser), PROMPT), rtol=1e-3, atol=1e-3)


def test_adapters_that_the_user_has_disabled_stay_so() -> None:
    pipe = sd1()
    base = latents(pipe, PROMPT)
    users_lora(pipe, "mine")
    pipe.disable_lora()
    eraser = fit(pipe)
    with eraser.attach(pipe):
        attached = latents(pipe, PROMPT)
    assert torch.equal(latents(pipe, PROMPT), base)
    torch.testing.assert_close(attached, latents(folded(sd1(), eraser), PROMPT), rtol=1e-4, atol=1e-4)
    pipe.enable_lora()
    assert pipe.get_active_adapters() == ["mine"] and not torch.equal(latents(pipe, PROMPT), base)


def test_two_stack_and_come_off_in_order() -> None:
    pipe = sd1()
    before, first, second = state(pipe), fit(pipe, seed=1, size=0.1), fit(pipe, seed=2, size=0.1, encoders=True)
    with first.attach(pipe):
        one = latents(pipe, PROMPT)
        with second.attach(pipe):
            both = latents(pipe, PROMPT)
        assert torch.equal(latents(pipe, PROMPT), one)
    assert same(pipe, before)
    torch.testing.assert_close(both, latents(folded(folded(pipe, first), second), PROMPT), rtol=1e-3, atol=1e-3)
    with second.attach(pipe), first.attach(pipe):
        torch.testing.assert_close(latents(pipe, PROMPT), both, rtol=1e-4, atol=1e-4)


def another_active(pipe: Any) -> None:
    users_lora(pipe, "later")
    pipe.set_adapters("later")


SWITCHES = {
    "disabled": lambda pipe: pipe.disable_lora(),
    "unloaded": lambda pipe: pipe.unload_lora_weights(),
    "deleted": lambda pipe: pipe.delete_adapters("erasure_001"),
    "weakened": lambda pipe: pipe.set_adapters("erasure_001", 0.5),
    "another loaded": lambda pipe: users_lora(pipe, "later"),
    "another made active": lambda pipe: another_active(pipe),
    "disabled in the text encoder": lambda pipe: pipe.text_encoder.disable_adapters(),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_it_cannot_be_switched_off_in_silence(switch: str) -> None:
    pipe = sd1()
    base = latents(pipe, PROMPT)
    eraser = fit(pipe, encoders=True)
    with eraser.attach(pipe):
        SWITCHES[switch](pipe)
        with pytest.raises(NotErased, match="erasure_001"):
            latents(pipe, PROMPT)
    if "later" in pipe.get_list_adapters().get("unet", []):
        pipe.delete_adapters("later")
    assert torch.equal(latents(pipe, PROMPT), base)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_scale_for_all_loras_is_refused(scale: float) -> None:
    pipe = sd1()
    embeds = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    for encoders in (False, True):
        with fit(pipe, encoders=encoders).attach(pipe):
            wanted = latents(pipe, PROMPT)
            with pytest.raises(NotErased, match="the scale in lora_scale"):
                latents(pipe, PROMPT, cross_attention_kwargs={"scale": scale})
            with pytest.raises(NotErased, match="the scale in cross_attention_kwargs"):
                pipe.unet(torch.zeros(2, 4, 8, 8), 1, torch.cat(embeds), cross_attention_kwargs={"scale": scale})
            assert torch.equal(latents(pipe, PROMPT, cross_attention_kwargs={"scale": 1.0}), wanted)


def test_a_lora_can_be_added_while_it_is_attached() -> None:
    pipe = sd1()
    with fit(pipe).attach(pipe):
        users_lora(pipe, "later")
        pipe.set_adapters(["later", "erasure_001"], [0.5, 1.0])
        with_both = latents(pipe, PROMPT)
    assert pipe.get_active_adapters() == ["later"] and not torch.equal(latents(pipe, PROMPT), with_both)


def test_copies_are_erased_or_refuse() -> None:
    pipe = sd1()
    base, eraser = latents(pipe, PROMPT), fit(pipe)
    with eraser.attach(pipe):
        attached, copied = latents(pipe, PROMPT), copy.deepcopy(pipe)
        assert torch.equal(latents(type(pipe).from_pipe(pipe), PROMPT), attached)
    assert torch.equal(latents(copied, PROMPT), attached) and torch.equal(latents(pipe, PROMPT), base)
    copied.disable_lora()
    with pytest.raises(NotErased):
        latents(copied, PROMPT)


def test_saving_or_fusing_the_attached_pipeline_is_refused(tmp_path: Path) -> None:
    pipe = sd1()
    with fit(pipe).attach(pipe):
        with pytest.raises(NotErased, match=r"random numbers.*erasure export"):
            pipe.save_pretrained(tmp_path)
        with pytest.raises(NotErased, match="bit-exactly"):
            pipe.fuse_lora()
    pipe.save_pretrained(tmp_path)


def test_a_fused_lora_would_mute_it() -> None:
    pipe = sd1()
    users_lora(pipe, "mine")
    pipe.fuse_lora()
    with pytest.raises(Conflict, match="fused"), fit(pipe).attach(pipe):
        pass
    pipe.unload_lora_weights()
    base = latents(pipe, PROMPT)
    with fit(pipe).attach(pipe):
        assert not torch.equal(latents(pipe, PROMPT), base)
    assert torch.equal(latents(pipe, PROMPT), base)


def test_fusing_behind_its_back_is_noticed() -> None:
    pipe = sd1()
    with pytest.raises(Conflict, match="fused"), fit(pipe).attach(pipe):
        pipe.unet.fuse_lora()
        with pytest.raises(NotErased):
            latents(pipe, PROMPT)
    assert not pipe.get_list_adapters()


def renamed(factors: Mapping[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {key.replace(old, new): tensor for key, tensor in factors.items()}


BROKEN = {
    "no component": (lambda f: renamed(f, "unet.", ""), "begin with the component"),
    "another word": (lambda f: renamed(f, "unet.", "model."), "begin with the component"),
    "half a pair": (lambda f: dict(list(f.items())[1:]), "pair"),
    "ranks": (lambda f: {k: t[:1] if "lora_A" in k else t for k, t in f.items()}, "one rank"),
    "zero": (lambda f: {k: t * (0 if "lora_B" in k else 1) for k, t in f.items()}, "zero"),
    "nan": (lambda f: {k: t * float("nan") for k, t in f.items()}, "not finite"),
    "none": (lambda f: {}, "zero"),
    "no layer": (lambda f: renamed(f, "attn2", "attn9"), "no layer"),
    "no such component": (lambda f: renamed(f, "unet.", "transformer."), "no transformer"),
    "shape": (lambda f: {k: t[:, :-1] if "lora_A" in k else t for k, t in f.items()}, "does not load"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_would_be_a_silent_no_op_raises(case: str) -> None:
    pipe = sd1()
    before, factors = state(pipe), fit(pipe).factors
    change, message = BROKEN[case]
    with pytest.raises(ErasureError, match=message), AdapterEraser(RandomLoRA(), (CONCEPT,), change(factors)).attach(pipe):
        pass
    assert same(pipe, before) and not pipe.get_list_adapters() and not hasattr(pipe, "_erasers")


def test_a_loader_that_skips_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = sd1()
    eraser = fit(pipe)
    monkeypatch.setattr(pipe.unet, "load_lora_adapter", lambda *args, **kwargs: None)
    with pytest.raises(NothingAttached, match="did not load"), eraser.attach(pipe):
        pass


def test_collect_reads_a_trained_adapter_whatever_its_alpha() -> None:
    pipe = sd1()
    users_lora(pipe, "trained")
    config = LoraConfig(r=2, lora_alpha=1, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False)
    pipe.text_encoder.add_adapter(config, adapter_name="trained")
    wanted = latents(pipe, PROMPT)
    factors = lora.collect(pipe, "trained")
    assert any(key.startswith("text_encoder.text_model.encoder.layers.0.self_attn.q_proj") for key in factors)
    pipe.unload_lora_weights()
    with AdapterEraser(RandomLoRA(), (CONCEPT,), factors).attach(pipe):
        torch.testing.assert_close(latents(pipe, PROMPT), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(NothingAttached, match="no adapter 'trained'"):
        lora.collect(pipe, "trained")


# as an artefact


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, AdapterEraser, Path]:
    pipe = sd1()
    eraser = fit(pipe, encoders=True)
    return pipe, eraser, artifact.save(eraser, tmp_path / "lora", pipe=pipe, base_id="tiny")


def test_the_artefact_loads_here_and_by_plain_diffusers(saved: tuple[Any, AdapterEraser, Path], caplog: pytest.LogCaptureFixture) -> None:
    pipe, eraser, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "erasure_config.json", LORA]
    with eraser.attach(pipe):
        wanted = latents(pipe, PROMPT)
    assert torch.equal(latents(erasure.load(folder, base=sd1()), PROMPT), wanted)
    plain = sd1()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        plain.load_lora_weights(str(folder))
    assert not [record for record in caplog.records if "lora" in record.getMessage().lower()]
    assert {len(v) for v in plain.get_list_adapters().values()} == {1} and plain.get_list_adapters().keys() == {"unet", "text_encoder"}
    torch.testing.assert_close(latents(plain, PROMPT), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["adapter", "weights"])
def test_an_artefact_loads_beside_a_lora_of_the_users(kind: str, saved: tuple[Any, AdapterEraser, Path], tmp_path: Path) -> None:
    """Fingerprint and canary are of the base: a LoRA that is loaded already neither hides another base nor moves the canary."""
    _, eraser, folder = saved
    if kind == "weights":
        folder = artifact.save(UCE().fit(sd1(), [CONCEPT]), tmp_path / "uce", pipe=sd1(), base_id="tiny")
    pipe = sd1()
    users_lora(pipe, "mine")
    alone, before = latents(pipe, PROMPT), state(pipe)
    report = erasure.verify(folder, pipe)
    assert report["canary"]["measured"] == pytest.approx(report["canary"]["recorded"], rel=1e-3)
    assert same(pipe, before) and torch.equal(latents(pipe, PROMPT), alone)
    both = latents(erasure.load(folder, base=pipe), PROMPT)
    if kind == "adapter":
        assert pipe.unet.active_adapters() == ["mine", "erasure_001"]
        other = folded(sd1(), eraser)
        users_lora(other, "mine")
        assert (both - latents(other, PROMPT)).norm() < 1e-3 * both.norm()
    erasure.detach(pipe)
    assert same(pipe, before) and torch.equal(latents(pipe, PROMPT), alone) and not torch.equal(both, alone)


def test_an_unprefixed_file_is_refused(saved: tuple[Any, AdapterEraser, Path], tmp_path: Path) -> None:
    """What ``unet.save_lora_adapter`` writes: plain diffusers skips it with a warning and makes the unerased image."""
    pipe, _, folder = saved
    users_lora(pipe, "mine")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet, adapter_name="mine"))
    pipe.unload_lora_weights()
    save_file(layers, folder / LORA)
    rehash(folder)
    refused(folder, sd1(), "begin with the component")


@pytest.mark.parametrize("header", [None, {"lora_adapter_metadata": "{}"}, {"lora_adapter_metadata": "{"}])
def test_a_header_that_plain_diffusers_would_read_otherwise_is_refused(
    saved: tuple[Any, AdapterEraser, Path], header: dict[str, str] | None
) -> None:
    _, _, folder = saved
    save_file(load_file(folder / LORA), folder / LORA, metadata=header)
    rehash(folder)
    refused(folder, sd1(), "header describes")


def test_the_canary_guards_a_weakened_adapter(saved: tuple[Any, AdapterEraser, Path]) -> None:
    _, _, folder = saved
    weak = {key: tensor * (0.1 if "lora_B" in key else 1) for key, tensor in load_file(folder / LORA).items()}
    lora.write(weak, folder)
    rehash(folder)
    with pytest.raises(ArtifactError, match="canary"):
        erasure.load(folder, base=sd1())
    refused(folder, sd1(), "canary")


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "wan"])
def test_other_families(family: str) -> None:
    pipe = getattr(tiny, family)().to(torch.float64)  # random models magnify rounding
    base, before = latents(pipe, PROMPT), state(pipe)
    eraser = fit(pipe, layers="attn", encoders=family in ("sdxl", "sd3", "flux"))
    with eraser.attach(pipe):
        attached = latents(pipe, PROMPT)
    assert (attached - base).norm() > 0.05 * base.norm()
    assert (attached - latents(folded(pipe, eraser), PROMPT)).norm() < 1e-3 * base.norm()
    assert same(pipe, before) and torch.equal(latents(pipe, PROMPT), base)
