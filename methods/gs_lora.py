"""GS-LoRA: a group-sparse LoRA on feed-forward layers that forgets concepts one after another; our transfer from classifiers."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

from erasure import tuning
from erasure.adapter import AdapterEraser
from erasure.callbacks import Callback
from erasure.concept import Concept
from erasure.errors import ErasureError, NothingAttached
from erasure.families import Family
from erasure.lora import by_component
from erasure.merging import added, delta
from erasure.method import Run
from erasure.seams import weights
from erasure.trained import FROM_PRESET, OfPreset, Session, TrainedMethod, check_concepts
from erasure.training import Loss, Training
from erasure.tuning import Tuned

FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp")
"""Linear layers of feed-forwards, as dotted parts of names; proj_mlp is that of FLUX.1's single blocks."""


def group_lasso(groups: Iterable[Sequence[Tensor]]) -> Tensor:
    """Σ over groups of the norm of all entries of a group's tensors, a scalar; the gradient at a group of zeros is zero.

    The subgradient of least norm there, where the plain root has none (NaN in the released code). Source: Zhao et al., CVPR 2024, eq. 6.
    """
    total: Tensor | None = None
    for group in groups:
        square = torch.stack([each.to(torch.promote_types(each.dtype, torch.float32)).square().sum() for each in group]).sum()
        empty = square == 0
        norm = torch.where(empty, 0.0, torch.where(empty, 1.0, square).sqrt())
        total = norm if total is None else total + norm
    return torch.zeros(()) if total is None else total


@torch.no_grad()
def shrink(groups: Iterable[Sequence[Tensor]], amount: float) -> None:
    """The proximal step of ``amount`` times `group_lasso`, in place: each group's norm is less by that, and zero where it was less."""
    for group in groups:
        norm = torch.stack([each.square().sum() for each in group]).sum().sqrt()
        share = (1 - amount / norm).clamp(min=0.0) if norm > 0 else norm
        for each in group:
            each.mul_(share)


def forget(error: Tensor, bound: float) -> Tensor:
    """ReLU(BND - error): the loss that is left until the concept's denoising error, a scalar, has grown to the bound; from eq. 4."""
    return relu(bound - error)


def groups_of(names: Iterable[str]) -> list[list[str]]:
    """Names of LoRA factors by feed-forward: all pairs of one block; another layer is a group of its own."""
    found: dict[str, list[str]] = {}
    for name in names:
        block = f"{name.partition('.lora_')[0]}."
        for part in FEED_FORWARD:
            block = block.partition(f".{part}.")[0]
        found.setdefault(block, []).append(name)
    return list(found.values())


@dataclass(frozen=True)
class Shrink(Callback):
    """The proximal step after each of Adam's, in Adam's own measure: a group's gradients are divided by their root mean second moment.

    So α is weighed against gradients, as in the objective: a group stays at zero whose loss pulls less than α. A step of α times the
    learning rate alone never gets there, since Adam's are as long however small the gradients are.
    """

    alpha: float
    groups: list[list[str]] = field(repr=False)

    def step(self, run: Training) -> None:
        for group in self.groups:
            weights = [run.weights[name] for name in group]
            shrink([weights], self.alpha * run.reach(weights))
        run.publish()


@dataclass(frozen=True, kw_only=True)
class GSLoRA(TrainedMethod):
    """Group Sparse LoRA (Zhao et al., CVPR 2024), made for classifiers and carried to the denoising loss here: our transfer.

    A LoRA on feed-forward layers alone. The concept's denoising error on the base's own images of it is driven up to a bound, and no
    further; retained images and those of anchors are learned as ever; a group lasso over the blocks leaves those alone that need not
    change, by a proximal step, since descent on the norm (``penalty=loss``: the paper's and the released code's) never ends at zero, and
    is NaN there in that code. Several concepts are tasks one after another: each has a LoRA of its own, trained on what the former
    left, and all are added up. Its part is always these feed-forwards, unless ``layers`` are given.
    """

    name: ClassVar[str] = "gs_lora"
    paper: ClassVar[str] = "arXiv:2403.11530"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {  # rank, α and β of the released GS-LoRA++ script; the rest is ours for SD 1.5: a classifier's says nothing
            "part": "full", "steps": 500, "lr": 1e-4, "batch": 4, "guidance": 7.5, "sampling_steps": 50, "images": 200,
            "rank": 8, "alpha": 1e-4, "beta": 0.15, "bound": 1.0, "retain_scale": 1.0, "expand": False,
        },
        "canvas": {
            "part": "full", "steps": 300, "lr": 1e-3, "batch": 8, "guidance": 4.0, "sampling_steps": 10, "images": 192,
            "rank": 8, "alpha": 1e-2, "beta": 1.0, "bound": 1.0, "retain_scale": 1.0, "expand": True,
        },
    }  # fmt: skip

    layers: tuple[str, ...] = ()
    """Linear layers instead of the feed-forwards', by names or dotted parts of names."""
    rank: OfPreset[int] = FROM_PRESET
    """Rank of each concept's LoRA."""
    images: OfPreset[int] = FROM_PRESET
    """Images of the concept, and as many that remain, that the base makes first."""
    bound: OfPreset[float] = FROM_PRESET
    """BND: the mean squared error at which the concept counts as forgotten; predictions have about unit variance."""
    alpha: OfPreset[float] = FROM_PRESET
    """α, weight of the group lasso."""
    penalty: Literal["proximal", "loss"] = "proximal"
    """The group lasso as a proximal step after each of Adam's, or as a term of the loss."""
    beta: OfPreset[float] = FROM_PRESET
    """β, weight of forgetting."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.bound > 0 or not self.beta > 0 or not 0 <= self.alpha < float("inf"):
            raise ErasureError(
                f"gs_lora: bound is {self.bound}, beta {self.beta}, alpha {self.alpha}; give bound and beta above 0, alpha >= 0"
            )

    def tuned(self, pipe: Any, family: Family, seed: int) -> AbstractContextManager[Tuned]:
        named = [name for _, denoiser in family.parts(pipe) for name, _ in denoiser.named_parameters()]
        layers = self.layers or tuple(part for part in FEED_FORWARD if any(f".{part}." in name for name in named))
        if not layers:
            raise NothingAttached(f"{type(pipe).__name__} has no feed-forward layers that gs_lora knows; name layers")
        return tuning.lora(pipe, tuning.chosen(pipe, family, "full", layers), self.rank, seed)

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> AdapterEraser:  # type: ignore[override]
        check_concepts(self.name, concepts)  # all at once: what one erases, no other may retain
        so_far: dict[str, Tensor] = {}
        for task, concept in enumerate(concepts):
            own = replace(run, checkpoint=run.checkpoint / f"task-{task}" if run.checkpoint else None)
            with weights.swapped(pipe, _moved(pipe, so_far)):
                found = self.run(pipe, [concept], own)
            so_far = added([so_far, found]) if so_far else found
        return self.eraser(tuple(concepts), so_far)

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> AdapterEraser:  # type: ignore[override]
        norms = [float(group_lasso([[tensors[name] for name in group]])) for group in groups_of(tensors)]
        return AdapterEraser(
            self, concepts, tensors, notes={"Blocks": {"feed-forwards": {"all": len(norms), "left alone": norms.count(0)}}}
        )

    def optimiser(self) -> dict[str, Any]:
        return {"clip": 1.0}

    def objective(self, session: Session) -> Loss:
        pairs, kept = self.phrases(session.concepts), self.retained(session.concepts)
        making: dict[str, Any] = {"steps": self.sampling_steps, "guidance": self.guidance, "batch": max(self.batch, 8)}
        groups = groups_of(session.tuned.parameters) if self.penalty == "loss" else []
        gone = session.pool([word for word, _ in pairs], self.images, **making)
        remain = session.pool([*dict.fromkeys(anchor for _, anchor in pairs), *kept], self.images, **making)
        of = session.denoising

        def loss(step: int, generator: torch.Generator) -> Tensor:
            some = gone.noised(of, self.batch, generator)
            error = (of.predict(some.x_t, some.t, some.prompts) - some.target).square().mean()
            rest = remain.noised(of, self.batch, generator)
            kept_error = (of.predict(rest.x_t, rest.t, rest.prompts) - rest.target).square().mean()
            lasso = group_lasso([session.tuned.parameters[name] for name in group] for group in groups)
            return self.beta * forget(error, self.bound) + self.retain_scale * kept_error + self.alpha * lasso.to(error)

        return loss

    def watchers(self, tuned: Tuned) -> tuple[Callback, ...]:
        return (Shrink(self.alpha, groups_of(tuned.parameters)),) if self.penalty == "proximal" else ()


def _moved(pipe: Any, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the layers of a LoRA with it added."""
    return {
        f"{component}.{layer}.weight": (weight + delta(pair).to(weight)).detach()
        for component, layers in by_component(factors).items()
        for layer, pair in layers.items()
        for weight in (weights.parameter(pipe, f"{component}.{layer}.weight"),)
    }
