"""What every method owes every pipeline: it changes its target, it leaves no trace, it survives saving, and it never fails in silence."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, StableDiffusionImg2ImgPipeline
from torch import Tensor

import erasure
from erasure import artifact
from erasure.concept import Concept
from erasure.errors import Conflict, ErasureError, NotErased, NothingAttached, UnsupportedFamily
from erasure.method import Eraser, Run, RuntimeEraser, WeightEraser
from erasure.registry import methods
from tests.tiny import latents, sd1


@dataclass(frozen=True)
class Case:
    """A method on a family; add a row here when either grows."""

    method: str
    build: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.method}-{self.build.__name__}"

    def fit(self, pipe: Any, concept: Concept | None = None, **config: Any) -> Eraser:
        eraser: Eraser = methods.get(self.method).from_config(config).fit(pipe, [concept or CONCEPT], run=Run(progress=False))
        return eraser


CONCEPT = Concept("dagger", targets=("dagger", "knife"), anchors=("cat",), retain=("boat",))
TARGET = "a photo of a dagger"
CASES = [Case(method, build) for method in ("negative_prompt", "uce", "safree") for build in (sd1,)]
RUNTIME = [case for case in CASES if case.method in ("negative_prompt", "safree")]
PROMPT_SEAM = RUNTIME

every = pytest.mark.parametrize("case", CASES, ids=str)
runtime = pytest.mark.parametrize("case", RUNTIME, ids=str)
prompt_seam = pytest.mark.parametrize("case", PROMPT_SEAM, ids=str)


def state(pipe: Any) -> dict[str, Tensor]:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}


def hooks(pipe: Any) -> int:
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for part in parts for m in part.modules())


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.fixture(scope="module")
def pipes() -> dict[Any, Any]:
    return {build: build() for build in {case.build for case in CASES}}


@pytest.fixture
def pipe(case: Case, pipes: dict[Any, Any]) -> Any:
    """A pipeline shared by the tests of a family: each test leaves it as it found it, or a later one fails."""
    return pipes[case.build]


@every
def test_attach_changes_the_target_and_detach_restores_every_bit(case: Case, pipe: Any) -> None:
    base, before, attributes, hooked = latents(pipe, TARGET), state(pipe), set(vars(pipe)), hooks(pipe)
    eraser = case.fit(pipe)
    assert same_state(state(pipe), before) and set(vars(pipe)) == attributes and hooks(pipe) == hooked, "fit leaves no trace"
    with eraser.attach(pipe) as attached:
        assert attached is pipe
        erased = latents(pipe, TARGET)
        assert torch.equal(latents(pipe, TARGET), erased), "an attached pipeline repeats itself"
    assert (erased - base).norm() > 0.05 * base.norm()
    assert torch.equal(latents(pipe, TARGET), base)
    assert same_state(state(pipe), before)
    assert set(vars(pipe)) == attributes and hooks(pipe) == hooked


@every
def test_an_error_in_the_block_detaches_too(case: Case, pipe: Any) -> None:
    before, attributes = state(pipe), set(vars(pipe))
    with pytest.raises(ZeroDivisionError), case.fit(pipe).attach(pipe):
        raise ZeroDivisionError
    assert same_state(state(pipe), before) and set(vars(pipe)) == attributes


@every
def test_save_and_load_give_the_same_pipeline(case: Case, pipe: Any, tmp_path: Path) -> None:
    eraser = case.fit(pipe)
    with eraser.attach(pipe):
        erased = latents(pipe, TARGET)
    artifact.save(eraser, tmp_path / "out", pipe=pipe, base_id="tiny")
    fresh = case.build()
    loaded = erasure.load(tmp_path / "out", base=fresh)
    assert loaded is fresh
    assert torch.equal(latents(fresh, TARGET), erased)
    again, config = artifact.load_eraser(tmp_path / "out")
    assert type(again) is type(eraser) and again.method == eraser.method and again.concepts == eraser.concepts
    assert config["kind"] == eraser.kind
    erasure.detach(fresh)
    assert torch.equal(latents(fresh, TARGET), latents(pipe, TARGET))


@every
def test_an_artefact_does_not_depend_on_the_users_scheduler(case: Case, pipe: Any, tmp_path: Path) -> None:
    artifact.save(case.fit(pipe), tmp_path / "out", pipe=pipe, base_id="tiny")
    for cls in (DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler):
        other = case.build()
        other.scheduler = scheduler = cls.from_config(other.scheduler.config)
        report = erasure.verify(tmp_path / "out", other)
        assert report["canary"]["measured"] == pytest.approx(report["canary"]["recorded"], rel=1e-3)
        assert other.scheduler is scheduler


@every
def test_verify_leaves_an_attached_eraser_in_place(case: Case, pipe: Any, tmp_path: Path) -> None:
    artifact.save(case.fit(pipe), tmp_path / "out", pipe=pipe, base_id="tiny")
    other = case.build()
    latents(other, TARGET)  # a pipeline's first call sets attributes of its own
    attributes = set(vars(other))
    erasure.verify(tmp_path / "out", other)
    assert set(vars(other)) == attributes
    erasure.load(tmp_path / "out", base=other)
    erased = latents(other, TARGET)
    with pytest.raises(ErasureError):
        erasure.verify(tmp_path / "out", other)
    assert torch.equal(latents(other, TARGET), erased)


@every
def test_a_batch_equals_its_prompts_one_by_one(case: Case, pipe: Any) -> None:
    prompts = [TARGET, "the night sky with a big red cat on a boat"]
    with case.fit(pipe).attach(pipe):
        both = latents(pipe, prompts, seed=[1, 2])
        singles = torch.cat([latents(pipe, text, seed=seed) for text, seed in zip(prompts, (1, 2), strict=True)])
    assert (both - singles).abs().max() < 1e-4


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_device_are_kept(case: Case, dtype: torch.dtype) -> None:
    pipe = case.build().to(dtype)
    base, before = latents(pipe, TARGET), state(pipe)
    eraser = case.fit(pipe)
    with eraser.attach(pipe):
        erased = latents(pipe, TARGET)
        assert {p.dtype for p in pipe.unet.parameters()} == {dtype}
    assert erased.dtype == base.dtype == dtype and erased.device == base.device
    assert erased.isfinite().all() and (erased - base).norm() > 0.05 * base.norm()
    assert torch.equal(latents(pipe, TARGET), base) and same_state(state(pipe), before)


@every
def test_an_eraser_fitted_in_one_dtype_attaches_in_another(case: Case, pipe: Any) -> None:
    half = case.build().to(torch.bfloat16)
    base = latents(half, TARGET)
    with case.fit(pipe).attach(half):
        erased = latents(half, TARGET)
    assert erased.dtype == torch.bfloat16 and (erased - base).norm() > 0.05 * base.norm()
    assert torch.equal(latents(half, TARGET), base)


@every
def test_neither_fit_nor_attach_draws_from_any_generator(case: Case, pipe: Any) -> None:
    def after(run: Callable[[torch.Generator], Any]) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        run(generator)
        return generator.get_state()

    glob = torch.random.get_rng_state()
    eraser = case.fit(pipe)
    plain = after(lambda g: latents(pipe, TARGET, generator=g, eta=0.5))
    with eraser.attach(pipe):
        erased = after(lambda g: latents(pipe, TARGET, generator=g, eta=0.5))
    assert torch.equal(plain, erased)
    assert torch.equal(torch.random.get_rng_state(), glob)


@every
def test_attaching_twice_is_a_conflict(case: Case, pipe: Any) -> None:
    eraser = case.fit(pipe)
    attributes = set(vars(pipe))
    with eraser.attach(pipe), pytest.raises(Conflict, match=case.method), eraser.attach(pipe):
        pass
    assert set(vars(pipe)) == attributes


class Stranger:
    """A pipeline of no known family."""


@every
def test_another_family_is_refused(case: Case, pipe: Any) -> None:
    with pytest.raises(UnsupportedFamily, match="Stranger"):
        case.fit(Stranger())
    with pytest.raises(UnsupportedFamily, match="Stranger"), case.fit(pipe).attach(Stranger()):
        pass


@every
def test_nothing_touched_is_an_error(case: Case, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    eraser = case.fit(pipe)
    attributes = set(vars(pipe))
    if isinstance(eraser, WeightEraser):
        empty = eraser.method.eraser(eraser.concepts, {})
    else:
        empty = eraser
        monkeypatch.setattr(type(eraser), "edits", lambda *args: [])
    with pytest.raises(NothingAttached, match=case.method), empty.attach(pipe):
        pass
    assert set(vars(pipe)) == attributes


@every
def test_an_unknown_key_or_a_wrong_value_is_named(case: Case) -> None:
    cls = methods.get(case.method)
    with pytest.raises(ErasureError, match="strenght"):
        cls.from_config({"strenght": 1})
    with pytest.raises(TypeError, match="strenght"):
        cls(strenght=1)
    for name in cls().config():
        with pytest.raises(ErasureError, match=name):
            cls.from_config({name: object()})
    assert cls.from_config(cls().config()) == cls()


@every
def test_no_concepts_is_an_error(case: Case, pipe: Any) -> None:
    with pytest.raises(ErasureError, match="concept"):
        methods.get(case.method)().fit(pipe, [])


@every
def test_erase_attaches_until_detach(case: Case, pipe: Any) -> None:
    base, attributes = latents(pipe, TARGET), set(vars(pipe))
    eraser = erasure.erase(pipe, CONCEPT, case.method, run=Run(progress=False))
    assert eraser.method.name == case.method
    assert (latents(pipe, TARGET) - base).norm() > 0.05 * base.norm()
    erasure.detach(pipe)
    assert torch.equal(latents(pipe, TARGET), base) and set(vars(pipe)) == attributes
    erasure.detach(pipe)


@prompt_seam
def test_embeddings_that_no_eraser_has_seen_are_refused(case: Case, pipe: Any) -> None:
    embeds, negative = pipe.encode_prompt(TARGET, "cpu", 1, True)
    with case.fit(pipe).attach(pipe):
        with pytest.raises(NotErased, match="prompt_embeds"):
            latents(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative)  # type: ignore[arg-type]
        with pytest.raises(NotErased, match="negative_prompt_embeds"):
            latents(pipe, TARGET, negative_prompt_embeds=negative)
        with pytest.raises(NotErased, match="before any prompt"):
            pipe.unet(torch.zeros(2, 4, 8, 8), 1, encoder_hidden_states=torch.cat([negative, embeds]))
        latents(pipe, "a cat")
        with pytest.raises(NotErased, match="did not pass"):
            pipe.unet(torch.zeros(2, 4, 8, 8), 1, encoder_hidden_states=torch.cat([negative, embeds]))


@prompt_seam
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_a_pipeline_made_from_the_attached_one_is_refused(case: Case, guidance: float) -> None:
    pipe = case.build()
    options: dict[str, Any] = {
        "image": torch.zeros(1, 3, 16, 16),
        "num_inference_steps": 4,
        "output_type": "latent",
        "guidance_scale": guidance,
    }
    with case.fit(pipe).attach(pipe):
        other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        with pytest.raises(NotErased):
            other(TARGET, **options)
        latents(pipe, TARGET)  # the attached pipeline's own call must not open the door for the other
        with pytest.raises(NotErased):
            other(TARGET, **options)


@runtime
def test_a_runtime_eraser_forbids_saving_the_base(case: Case, pipe: Any, tmp_path: Path) -> None:
    with case.fit(pipe).attach(pipe), pytest.raises(NotErased, match="erasure export"):
        pipe.save_pretrained(tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()
    pipe.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model_index.json").exists()


def test_a_weight_eraser_ships_as_an_ordinary_pipeline(tmp_path: Path) -> None:
    pipe = sd1()
    with CASES[1].fit(pipe).attach(pipe):
        erased = latents(pipe, TARGET)
        pipe.save_pretrained(tmp_path / "shipped")
    shipped = type(pipe).from_pretrained(tmp_path / "shipped", use_safetensors=True)
    shipped.set_progress_bar_config(disable=True)
    assert torch.allclose(latents(shipped, TARGET), erased, atol=1e-5)


# several erasers on one pipeline

NEGATIVE, UCE, SAFREE = CASES


@pytest.mark.parametrize(
    ("inner", "outer"), [(NEGATIVE, UCE), (UCE, NEGATIVE), (UCE, SAFREE), (NEGATIVE, SAFREE), (SAFREE, NEGATIVE)], ids=str
)
def test_different_methods_stack(inner: Case, outer: Case) -> None:
    pipe = sd1()
    base, attributes = latents(pipe, TARGET), set(vars(pipe))
    first, second = inner.fit(pipe), outer.fit(pipe, Concept("cat", anchors=("boat",)))
    with first.attach(pipe):
        alone = latents(pipe, TARGET)
        with second.attach(pipe):
            both = latents(pipe, TARGET)
            with pytest.raises(NotErased if RuntimeEraser in (*type(first).__mro__, *type(second).__mro__) else ErasureError):
                latents(pipe, None, prompt_embeds=torch.zeros(1, 77, 32), negative_prompt_embeds=torch.zeros(1, 77, 32))  # type: ignore[arg-type]
        assert torch.equal(latents(pipe, TARGET), alone)
    assert (both - alone).norm() > 1e-3 * base.norm() and (alone - base).norm() > 0.05 * base.norm()
    assert torch.equal(latents(pipe, TARGET), base) and set(vars(pipe)) == attributes and hooks(pipe) == 0


def test_two_uce_erasers_conflict() -> None:
    pipe = sd1()
    before, other = state(pipe), UCE.fit(pipe, Concept("cat"))
    with UCE.fit(pipe).attach(pipe), pytest.raises(Conflict, match="one method on all concepts"), other.attach(pipe):
        pass
    assert same_state(state(pipe), before)


@pytest.mark.parametrize(
    ("first", "second"), [(NEGATIVE, NEGATIVE), (NEGATIVE, SAFREE), (SAFREE, NEGATIVE), (UCE, SAFREE), (SAFREE, UCE)], ids=str
)
def test_taking_off_the_lower_eraser_first_raises_and_leaves_the_upper_at_work(first: Case, second: Case) -> None:
    pipe = sd1()
    base, before, attributes = latents(pipe, TARGET), state(pipe), set(vars(pipe))
    upper_eraser = second.fit(pipe)
    with upper_eraser.attach(pipe):
        upper_alone = latents(pipe, TARGET)
    lower, upper = first.fit(pipe).attach(pipe), upper_eraser.attach(pipe)
    lower.__enter__()
    upper.__enter__()
    latents(pipe, TARGET)
    with pytest.raises(Conflict, match="attached after it"):
        lower.__exit__(None, None, None)
    assert torch.equal(latents(pipe, TARGET), upper_alone)
    if isinstance(upper_eraser, RuntimeEraser):
        with pytest.raises(NotErased):
            pipe.save_pretrained("nowhere")
    upper.__exit__(None, None, None)
    assert torch.equal(latents(pipe, TARGET), base)
    assert same_state(state(pipe), before) and set(vars(pipe)) == attributes and hooks(pipe) == 0


def test_weights_that_something_else_changed_meanwhile_are_restored_and_reported() -> None:
    pipe = sd1()
    before = state(pipe)
    eraser = UCE.fit(pipe)
    assert isinstance(eraser, WeightEraser)
    with pytest.raises(Conflict, match="something else"), eraser.attach(pipe), torch.no_grad():
        pipe.unet.get_parameter(next(iter(eraser.changed)).removeprefix("unet.")).add_(1)
    assert same_state(state(pipe), before)


def test_offloaded_weights_are_refused_rather_than_left_unedited() -> None:
    pipe = sd1()
    eraser = UCE.fit(pipe)
    pipe.unet = copy.deepcopy(pipe.unet).to("meta")
    with pytest.raises(NothingAttached, match="offload"), eraser.attach(pipe):
        pass


def test_detach_takes_off_every_eraser_even_where_one_complains() -> None:
    pipe = sd1()
    before, attributes = state(pipe), set(vars(pipe))
    erasure.erase(pipe, CONCEPT, "negative_prompt")
    eraser = erasure.erase(pipe, CONCEPT, "uce")
    assert isinstance(eraser, WeightEraser)
    with torch.no_grad():
        pipe.unet.get_parameter(next(iter(eraser.changed)).removeprefix("unet.")).add_(1)
    with pytest.raises(Conflict):
        erasure.detach(pipe)
    assert same_state(state(pipe), before) and set(vars(pipe)) == attributes and hooks(pipe) == 0
