"""What every method owes every pipeline: it changes its target, it leaves no trace, it survives saving, and it never fails in silence."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import api, artifact
from ..concept import Concept
from ..errors import Conflict, ErasureError, NotErased, NothingAttached, UnsupportedFamily
from ..families import NAMES, family_of
from ..method import ErasureMethod, WeightEraser, attach_for_good, detach
from .subject import (
    CONCEPT,
    NEUTRAL,
    VISIBLE,
    Subject,
    change,
    edited_or_raises,
    given_embeds,
    quantise,
    raises,
    require,
    same_state,
    state,
    trace,
)
from .tiny import latents

Check = Callable[[Subject], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


@check
def attaching_changes_the_target_and_detaching_restores_every_bit(of: Subject) -> None:
    pipe = of.pipe
    base, before, traces = latents(pipe, of.target), state(pipe), trace(pipe)
    eraser = of.fit(pipe)
    require(same_state(state(pipe), before) and trace(pipe) == traces, "fit leaves no trace")
    with eraser.attach(pipe) as attached:
        require(attached is pipe, "attach yields the pipeline")
        erased = latents(pipe, of.target)
        require(torch.equal(latents(pipe, of.target), erased), "an attached pipeline repeats itself")
    require(change(erased, base) > VISIBLE, f"the target's latents move by {change(erased, base):.1e} only")
    require(torch.equal(latents(pipe, of.target), base), "the output after detaching is the base's")
    require(same_state(state(pipe), before), "the weights after detaching are the base's")
    require(trace(pipe) == traces, "no attribute and no hook stays behind")


@check
def an_error_in_the_block_detaches_too(of: Subject) -> None:
    pipe = of.pipe
    before, traces = state(pipe), trace(pipe)
    with raises(ZeroDivisionError), of.fit(pipe).attach(pipe):
        raise ZeroDivisionError
    require(same_state(state(pipe), before) and trace(pipe) == traces, "an error in the block leaves no trace")


@check
def saving_and_loading_give_the_same_pipeline(of: Subject) -> None:
    eraser = of.fit(of.pipe)
    with eraser.attach(of.pipe):
        erased = latents(of.pipe, of.target)
    with tempfile.TemporaryDirectory() as parent:
        folder = artifact.save(eraser, Path(parent) / "out", pipe=of.pipe, base_id="tiny")
        again, config = artifact.load_eraser(folder)
        require(type(again) is type(eraser) and config["kind"] == eraser.kind, "the same kind of eraser comes back")
        require(again.method == eraser.method and again.concepts == eraser.concepts, "method and concepts come back")
        fresh = of.build()
        require(api.load(folder, base=fresh) is fresh, "load gives the pipeline")
    require(torch.equal(latents(fresh, of.target), erased), "the loaded eraser gives what the fitted one gave")
    detach(fresh)
    require(torch.equal(latents(fresh, of.target), latents(of.pipe, of.target)), "the loaded eraser comes off")


@check
def a_batch_equals_its_prompts_one_by_one(of: Subject) -> None:
    prompts = [of.target, NEUTRAL]
    with of.fit(of.pipe).attach(of.pipe):
        both = latents(of.pipe, prompts, seed=[1, 2])
        singles = torch.cat([latents(of.pipe, text, seed=seed) for text, seed in zip(prompts, (1, 2), strict=True)])
    worst = float((both - singles).abs().max() / singles.abs().max().clamp(min=1))
    require(worst < 1e-4, f"a batch of two differs from singles by {worst:.1e}")


def _dtype_is_kept(of: Subject, dtype: torch.dtype) -> None:
    pipe = of.build().to(dtype)
    base, before = latents(pipe, of.target), state(pipe)
    with of.fit(pipe).attach(pipe):
        erased = latents(pipe, of.target)
        for name, denoiser in family_of(pipe).parts(pipe):
            kinds = {p.dtype for p in denoiser.parameters() if p.dtype != torch.float32}
            require(kinds == {dtype}, f"{name} stays {dtype}")
    require(erased.dtype == base.dtype and erased.device == base.device, "dtype and device are kept")
    require(erased.isfinite().all() and change(erased, base) > VISIBLE, f"it erases in {dtype}")
    require(torch.equal(latents(pipe, of.target), base) and same_state(state(pipe), before), f"it detaches in {dtype}")


@check
def bfloat16_is_kept(of: Subject) -> None:
    _dtype_is_kept(of, torch.bfloat16)


@check
def an_eraser_fitted_in_one_dtype_attaches_in_another(of: Subject) -> None:
    half = of.build().to(torch.bfloat16)
    base = latents(half, of.target)
    with of.fit(of.pipe).attach(half):
        require(change(latents(half, of.target), base) > VISIBLE, "fitted in float32, it erases in bfloat16")
    require(torch.equal(latents(half, of.target), base), "and detaches")


@check
def no_generator_is_drawn_from(of: Subject) -> None:
    def after() -> Tensor:
        generator = torch.Generator().manual_seed(5)
        latents(of.pipe, of.target, generator=generator)
        return generator.get_state()

    plain = after()
    eraser = of.fit(of.pipe)
    shared = torch.random.get_rng_state()
    with eraser.attach(of.pipe):
        require(torch.equal(plain, after()), "an attached eraser takes nothing from the image's generator")
    require(torch.equal(torch.random.get_rng_state(), shared), "nor from the global one")


@check
def attaching_twice_is_a_conflict(of: Subject) -> None:
    eraser, traces = of.fit(of.pipe), trace(of.pipe)
    with eraser.attach(of.pipe), raises(Conflict, of.method.name), eraser.attach(of.pipe):
        pass
    require(trace(of.pipe) == traces, "a refused second attach leaves no trace")


class Stranger:
    """A pipeline of no known family."""


@check
def another_family_is_refused(of: Subject) -> None:
    with raises(UnsupportedFamily, "Stranger"):
        of.fit(Stranger())
    with raises(UnsupportedFamily, "Stranger"), of.fit(of.pipe).attach(Stranger()):
        pass


@check
def nothing_touched_is_an_error(of: Subject) -> None:
    eraser, traces = of.fit(of.pipe), trace(of.pipe)
    nothing = copy.copy(eraser)
    object.__setattr__(nothing, "seams", lambda *args: [])
    with raises(NothingAttached, of.method.name), nothing.attach(of.pipe):
        pass
    if isinstance(eraser, WeightEraser):
        with raises(ErasureError), eraser.method.eraser(eraser.concepts, {}).attach(of.pipe):
            pass
    require(trace(of.pipe) == traces, "a refused attach leaves no trace")


@check
def an_unknown_key_or_a_wrong_value_is_named(of: Subject) -> None:
    with raises(ErasureError, "strenght"):
        of.method.from_config({"strenght": 1})
    for name in of.method().config():
        with raises(ErasureError, name):
            of.method.from_config({name: object()})
    require(of.method.from_config(of.method().config()) == of.method(), "config() rebuilds the method")


@check
def no_concepts_is_an_error(of: Subject) -> None:
    with raises(ErasureError, "concept"):
        of.method.from_config(of.config).fit(of.pipe, [])


@check
def erasing_lasts_until_detach(of: Subject) -> None:
    base, traces = latents(of.pipe, of.target), trace(of.pipe)
    attach_for_good(of.fit(of.pipe), of.pipe)
    require(change(latents(of.pipe, of.target), base) > VISIBLE, "attached for good, it erases")
    detach(of.pipe)
    require(torch.equal(latents(of.pipe, of.target), base) and trace(of.pipe) == traces, "detach undoes it")
    detach(of.pipe)


@check
def given_embeddings_are_edited_or_refused(of: Subject) -> None:
    base, embeds = latents(of.pipe, of.target), given_embeds(of.pipe, of.target)
    with of.fit(of.pipe).attach(of.pipe):
        edited_or_raises(lambda: latents(of.pipe, None, **embeds), base, "prompt_embeds=")  # type: ignore[arg-type]
        latents(of.pipe, of.target)  # the attached pipeline's own call must not open the door
        edited_or_raises(lambda: latents(of.pipe, None, **embeds), base, "prompt_embeds= after a call")  # type: ignore[arg-type]


@check
def pipelines_made_from_it_are_edited_or_refused(of: Subject) -> None:
    pipe = of.build()
    base = latents(pipe, of.target)
    with of.fit(pipe).attach(pipe):
        for make in (type(pipe).from_pipe, copy.deepcopy, copy.copy):
            other = make(pipe)
            other.set_progress_bar_config(disable=True)
            edited_or_raises(lambda other=other: latents(other, of.target), base, f"{make.__name__} of an attached pipeline")  # type: ignore[misc]
            latents(pipe, of.target)
            edited_or_raises(lambda other=other: latents(other, of.target), base, f"{make.__name__}, after the first")  # type: ignore[misc]


@check
def feature_caches_are_edited_or_refused(of: Subject) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = of.build()
    denoisers = [module for _, module in family_of(pipe).parts(pipe)]
    if not all(hasattr(module, "enable_cache") for module in denoisers):
        return
    base = latents(pipe, of.target)
    eraser = of.fit(pipe)

    def cached() -> Tensor:
        for module in denoisers:
            module.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        try:
            return latents(pipe, of.target)
        finally:
            for module in denoisers:
                module.disable_cache()

    with eraser.attach(pipe):
        edited_or_raises(cached, base, "a feature cache enabled on an attached pipeline")
    for module in denoisers:
        module.enable_cache(FirstBlockCacheConfig(threshold=0.1))

    def attached() -> Tensor:
        with eraser.attach(pipe):
            return latents(pipe, of.target)

    edited_or_raises(attached, base, "attaching to a pipeline with a feature cache")


@check
def quantised_bases_are_edited_or_refused_with_the_reason(of: Subject) -> None:
    pipe = quantise(of.build())
    base = latents(pipe, of.target)
    fitted = of.fit(of.pipe)
    denoisers = tuple(f"{name}." for name, _ in family_of(pipe).parts(pipe))
    if isinstance(fitted, WeightEraser) and any(name.startswith(denoisers) for name in fitted.writes()):
        for attempt in (lambda: of.fit(pipe).attach(pipe).__enter__(), lambda: fitted.attach(pipe).__enter__()):
            with raises(ErasureError, "quantis"):
                attempt()
        return
    with fitted.attach(pipe):
        require(change(latents(pipe, of.target), base) > VISIBLE, "what writes no weight of the denoiser works on a quantised base")
    require(torch.equal(latents(pipe, of.target), base), "and come off it")
    with tempfile.TemporaryDirectory() as parent:
        folder = artifact.save(fitted, Path(parent) / "out", pipe=of.pipe, base_id="tiny")
        api.load(folder, base=pipe)
    require(change(latents(pipe, of.target), base) > VISIBLE, "and their artefacts load onto it")
    detach(pipe)


@check
def sequentially_offloaded_bases_are_edited_or_refused(of: Subject) -> None:
    from accelerate import cpu_offload

    pipe = of.build()
    base, fitted = latents(pipe, of.target), of.fit(of.pipe)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, execution_device=torch.device("cpu"))

    def run() -> Tensor:
        with fitted.attach(pipe):
            return latents(pipe, of.target)

    edited_or_raises(run, base, "a sequentially offloaded pipeline")
    if fitted.kind == "runtime":
        require(change(run(), base) > VISIBLE, "a runtime eraser works on an offloaded pipeline")


@check
def a_runtime_eraser_forbids_saving_the_base(of: Subject) -> None:
    eraser = of.fit(of.pipe)
    if eraser.kind != "runtime":
        return
    with tempfile.TemporaryDirectory() as parent:
        target = Path(parent) / "shipped"
        with eraser.attach(of.pipe), raises(NotErased, "export"):
            of.pipe.save_pretrained(target)
        require(not target.exists(), "nothing is written")


@dataclass(frozen=True)
class Failure:
    """A check that did not hold."""

    family: str
    check: str
    reason: str

    def __str__(self) -> str:
        return f"[{self.family}] {self.check.replace('_', ' ')}: {self.reason}"


def check_method(
    method: type[ErasureMethod],
    *,
    families: Iterable[str] | None = None,
    config: Mapping[str, Any] | None = None,
    concept: Concept = CONCEPT,
) -> int:
    """Run the contract on a method class, on tiny random pipelines of each family that it supports; gives the number of checks that held.

    ``config``: settings under which to run it, such as few training steps. ``concept``: what to erase instead of a dagger; the tiny
    tokenizers know few words. Raises AssertionError with every failure, so that one run shows all.
    """
    names = list(families) if families is not None else [name for name in NAMES if name in method.families]
    if unknown := set(names) - set(NAMES):
        raise ErasureError(f"no family {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if not names:
        raise ErasureError(f"{method.__name__}.families names no family of this version ({', '.join(NAMES)})")
    failures, held = [], 0
    for name in names:
        subject = Subject(method, name, config or {}, concept)
        for title, function in CHECKS.items():
            try:
                function(subject)
                held += 1
            except Exception as error:
                failures.append(Failure(name, title, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__))
    if failures:
        listed = "\n".join(map(str, failures))
        raise AssertionError(f"{method.__name__} breaks {len(failures)} of {held + len(failures)} checks:\n{listed}")
    return held
