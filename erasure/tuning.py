"""What a method trains, inside a pipeline: chosen parameters or a LoRA, with the base at hand, and everything put back afterwards."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import ErasureError, NothingAttached
from .families import Family
from .seams import adapters
from .seams.weights import editable

Part = Literal["kv", "x", "u", "full", "selfattn"]
"""Keys and values of the text; its cross-attention; all but that, the timestep embedding and the output; all; self-attention."""


@dataclass(frozen=True)
class Tuned:
    """Parameters under training, by the names that an eraser has for them."""

    parameters: dict[str, Tensor]
    originals: dict[str, Tensor]
    """Their values in the base: all that is kept of it (for a LoRA, factors without effect)."""

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The base inside the block, without gradients; nothing is copied, the parameters point elsewhere for a while."""
        trained = {name: parameter.data for name, parameter in self.parameters.items()}
        with torch.no_grad():
            self._point(self.originals)
            try:
                yield
            finally:
                self._point(trained)

    def _point(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data = values[name]
        torch.clear_autocast_cache()  # its casts are kept by parameter, and would be the other values'

    def tensors(self) -> dict[str, Tensor]:
        """Copies of what is trained, on the CPU; raises where training changed nothing."""
        if all(torch.equal(parameter, self.originals[name]) for name, parameter in self.parameters.items()):
            raise ErasureError("training changed no parameter beyond rounding: take a larger lr, more steps, or a float32 base")
        return {name: parameter.detach().clone().cpu() for name, parameter in self.parameters.items()}


def chosen(pipe: Any, family: Family, part: Part, layers: Sequence[str] = ()) -> list[str]:
    """Dotted names (with the component) of the denoiser's parameters in a part, or in ``layers``: parts of names, or names.

    Errors: a layer that is nowhere raises, with the nearest that there is.
    """
    named = [(f"{component}.{name}", name) for component, denoiser in family.parts(pipe) for name, _ in denoiser.named_parameters()]
    if layers:
        for layer in layers:
            if not any(_has(full, layer) for full, _ in named):
                raise ErasureError(_no_layer([full for full, _ in named], layer, type(pipe).__name__))
        return [full for full, _ in named if any(_has(full, layer) for layer in layers)]
    cross = {full for full, name in named if any(_has(name, part_of) for part_of in family.cross)}
    match part:
        case "kv":
            found = [full for full, name in named if any(_has(name, each) for each in family.cross_kv)]
        case "x":
            found = [full for full, _ in named if full in cross]
        case "selfattn":
            found = [full for full, name in named if any(_has(name, each) for each in family.self_attention)]
        case "u":
            found = [full for full, name in named if full not in cross and not name.startswith(tuple(f"{end}." for end in family.ends))]
        case "full":
            found = [full for full, _ in named]
    if not found:
        raise NothingAttached(f"{type(pipe).__name__} has no layers of the part {part!r}")
    return found


def _has(name: str, part: str) -> bool:
    return f".{part}." in f".{name}."


def _no_layer(names: Sequence[str], layer: str, pipeline: str) -> str:
    """What is wrong, with the nearest of all runs of one to three parts of names."""
    paths = (name.split(".")[:-1] for name in names)
    known = {".".join(path[i : i + n]) for path in paths for i in range(len(path)) for n in (1, 2, 3)}
    near = difflib.get_close_matches(layer, sorted(known), n=1)
    return f"{pipeline} has no layer {layer!r} in its denoiser{f'; did you mean {near[0]}?' if near else ''}"


@contextmanager
def weights(pipe: Any, names: Sequence[str]) -> Iterator[Tuned]:
    """Parameters of ``pipe`` by name, alone in wanting gradients; they come back bit-exactly."""
    parts = {part: dict(getattr(pipe, part).named_parameters()) for part in {name.partition(".")[0] for name in names}}
    live = {name: editable(name, parts[name.partition(".")[0]][name.partition(".")[2]]) for name in names}
    originals = {name: parameter.detach().clone() for name, parameter in live.items()}
    with _gradients(pipe, live.values()):
        try:
            yield Tuned(live, originals)
        finally:
            with torch.no_grad():
                for name, parameter in live.items():
                    parameter.copy_(originals[name])


@contextmanager
def lora(pipe: Any, names: Sequence[str], rank: int, seed: int) -> Iterator[Tuned]:
    """A LoRA on the linear layers that have ``names`` as parameters: A Gaussian of deviation 1 / rank, B zero, alpha the rank.

    The parameters are named as in diffusers' files. Errors: a part without linear layers, or a rank above what a layer has, raises.
    """
    draw = torch.Generator().manual_seed(seed)
    factors: dict[str, Tensor] = {}
    places: list[tuple[str, str, str]] = []
    for component, layer, linear in _linears(pipe, names):
        outputs, inputs = linear.out_features, linear.in_features
        if rank > min(outputs, inputs):
            raise ErasureError(f"{component}.{layer} is {outputs} x {inputs}: a LoRA of rank {rank} does not fit; take a smaller rank")
        factors[f"{component}.{layer}.lora_A.weight"] = torch.randn(rank, inputs, generator=draw) / rank
        factors[f"{component}.{layer}.lora_B.weight"] = torch.zeros(outputs, rank)
        places.append((component, layer, f"{component}.{layer}"))
    if not factors:
        raise NothingAttached(f"a LoRA goes on linear layers, and {names[0]} (and {len(names) - 1} more) are parameters of none")
    with adapters.loaded(pipe, factors):
        live: dict[str, Tensor] = {}
        for component, layer, name in places:
            tuned = getattr(pipe, component).get_submodule(layer)
            adapter = list(tuned.lora_A)[-1]
            live |= {f"{name}.lora_{side}.weight": getattr(tuned, f"lora_{side}")[adapter].weight for side in "AB"}
        with _gradients(pipe, live.values()):
            yield Tuned(live, {name: parameter.detach().clone() for name, parameter in live.items()})


def _linears(pipe: Any, names: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Component, name and module of the linear layers that own parameters of these names."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    for owner in owners:
        component, _, layer = owner.partition(".")
        module = getattr(pipe, component).get_submodule(layer)
        if isinstance(module, nn.Linear) or hasattr(module, "in_features"):
            yield component, layer, module


@contextmanager
def _gradients(pipe: Any, wanted: Any) -> Iterator[None]:
    """Of all parameters of a pipeline these alone want gradients; afterwards all are as they were, and no gradient stays."""
    everything = [p for part in pipe.components.values() if isinstance(part, nn.Module) for p in part.parameters()]
    before = [(p, p.requires_grad) for p in everything]
    for parameter in everything:
        parameter.requires_grad_(False)
    for parameter in (found := list(wanted)):
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        for parameter in found:
            parameter.grad = None


@contextmanager
def checkpointed(pipe: Any, family: Family, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing in the denoisers: activations are computed twice instead of kept."""
    with ExitStack() as stack:
        for name, denoiser in family.parts(pipe):
            if wanted and not denoiser.is_gradient_checkpointing:
                if not getattr(denoiser, "_supports_gradient_checkpointing", False):
                    raise ErasureError(f"{name} ({type(denoiser).__name__}) has no gradient checkpointing")
                denoiser.enable_gradient_checkpointing()
                stack.callback(denoiser.disable_gradient_checkpointing)
        yield
