"""Where gates sit in a denoiser, how they act while it runs, and how closed ones fold into its weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from erasure.errors import NothingAttached
from erasure.families import Family, Gated, Unit
from erasure.seams import activation
from erasure.seams.weights import editable, parameter


@dataclass(frozen=True)
class Site:
    """Units that are gated together: the heads of an attention, the inner neurons of a feed-forward, the outputs of a norm."""

    key: str
    """Component, block, layer and kind: ``unet.down_blocks.0.….transformer_blocks.0.ff.net.2.neurons``."""
    kind: Unit
    layers: tuple[str, ...]
    """Names, with the component, of the layers that the gates act on."""
    count: int
    width: int = 1
    """Neighbouring channels to a gate: those of a head."""
    start: int = 0
    """First channel."""

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.count * self.width)

    def spread(self, gates: Tensor) -> Tensor:
        """A value for each channel [count * width] of gates [count]."""
        return gates.repeat_interleave(self.width)


def find(pipe: Any, family: Family, units: Sequence[str], layers: Sequence[str] = ()) -> list[Site]:
    """All sites of these kinds in the denoisers, in the order of the modules; ``layers``: only those with one of these parts in the name.

    Errors: a pipeline that has none raises NothingAttached and names the layers that were looked for.
    """
    rows = [row for row in family.gates if row.kind in units]
    found = []
    for component, denoiser in family.parts(pipe):
        for name, block in denoiser.named_modules():
            owner, _, index = name.rpartition(".")
            for row in rows if index.isdigit() else ():
                if owner.rpartition(".")[2] == row.blocks and (site := _site(f"{component}.{name}", block, row)):
                    found.append(site)
    chosen = [site for site in found if not layers or any(f".{part}." in f".{site.key}." for part in layers)]
    if not chosen:
        wanted = ", ".join(f"{row.blocks}.*.{row.layers[0]}" for row in rows) or f"gates for {', '.join(units)} in the family's row"
        among = f" among the layers {', '.join(layers)}" if layers else ""
        raise NothingAttached(f"{type(pipe).__name__} ({family.name}) has nothing to mask{among}: none of {wanted}")
    return chosen


def _site(name: str, block: nn.Module, row: Gated) -> Site | None:
    there = [layer for layer in row.layers if _at(block, layer) is not None]
    if not there or there[0] != row.layers[0]:
        return None
    key, layers, module = f"{name}.{there[0]}.{row.kind}", tuple(f"{name}.{layer}" for layer in there), _at(block, there[0])
    attention: Any = _at(block, row.attention) if row.attention else None
    if row.kind == "norms":
        weight = getattr(module, "weight", None)
        return None if weight is None else Site(key, row.kind, layers, len(weight))
    if row.kind == "heads":
        return Site(key, row.kind, layers, attention.heads, attention.inner_dim // attention.heads)
    start = attention.inner_dim if attention is not None else 0
    return Site(key, row.kind, layers, module.in_features - start, start=start)


def _at(block: nn.Module, path: str) -> Any:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


def parameters(key: str, family_rows: Sequence[Gated]) -> set[str]:
    """Names of the parameters that a site's masks fold into, from its key alone."""
    names = set()
    for row in family_rows:
        if key.endswith(ending := f".{row.layers[0]}.{row.kind}") and f"{row.blocks}." in key:
            block = key.removesuffix(ending)
            if block.rpartition(".")[0].rpartition(".")[2] == row.blocks:
                kinds = ("weight", "bias") if row.kind == "norms" else ("weight",)
                names |= {f"{block}.{layer}.{each}" for layer in row.layers for each in kinds}
    return names


@contextmanager
def hooked(pipe: Any, sites: Sequence[Site], gates: Mapping[str, Tensor]) -> Iterator[int]:
    """Multiply the units of each site by ``gates`` [count], read at each call; a site without an entry is left alone."""
    reads: dict[nn.Module, list[Site]] = {}
    writes: dict[nn.Module, list[Site]] = {}
    for site in sites:
        for layer in site.layers:
            component, _, path = layer.partition(".")
            module = getattr(pipe, component).get_submodule(path)
            (writes if site.kind == "norms" else reads).setdefault(module, []).append(site)

    def edit(at: Mapping[nn.Module, list[Site]]) -> Any:
        def multiply(module: nn.Module, x: Tensor) -> Tensor:
            here = [site for site in at[module] if site.key in gates]
            if not here:
                return x
            factor = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
            for site in here:
                values = site.spread(gates[site.key].to(x))
                factor = torch.cat((factor[: site.start], values, factor[site.span.stop :]))
            return x * factor

        return multiply

    with ExitStack() as stack:
        opened = stack.enter_context(activation.inputs(reads, edit(reads)))
        yield opened + stack.enter_context(activation.outputs(writes, edit(writes)))


@torch.no_grad()
def fold(pipe: Any, sites: Sequence[Site], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of ``pipe`` with the units of closed gates at zero, by name: just what `hooked` with gates 0 and 1 computes.

    masks [count] bool by site key, True for closed. Heads and neurons: columns of the layer that reads them. Norms: rows of weight and
    bias.
    Errors: masks of another size, and weights that cannot be written, raise NothingAttached.
    """
    new: dict[str, Tensor] = {}
    for site in sites:
        if (mask := masks.get(site.key)) is None or not mask.any():
            continue
        if mask.shape != (site.count,):
            raise NothingAttached(f"{site.key}: {tuple(mask.shape)} gates for {site.count} {site.kind}: another base model")
        for layer in site.layers:
            for name in (f"{layer}.weight", f"{layer}.bias") if site.kind == "norms" else (f"{layer}.weight",):
                if name.endswith("bias") and not _has_bias(pipe, layer):
                    continue
                value = new.get(name)
                if value is None:
                    value = editable(name, parameter(pipe, name)).detach().clone()
                off = site.spread(mask.to(value.device))
                if site.kind == "norms":
                    value[off] = 0
                else:
                    value[:, site.span].masked_fill_(off, 0)
                new[name] = value
    return new


def _has_bias(pipe: Any, layer: str) -> bool:
    component, _, path = layer.partition(".")
    return getattr(getattr(pipe, component).get_submodule(path), "bias", None) is not None


def shares(masks: Mapping[str, Tensor]) -> dict[str, dict[str, dict[str, int]]]:
    """How many units are ``off`` of ``all``, by kind (heads, neurons, norms) and then by block; block "" is all blocks together.

    Blocks are named with the component, layers of one kind in one block are added up.
    """
    found: dict[str, dict[str, dict[str, int]]] = {}
    for key, mask in masks.items():
        path, _, kind = key.rpartition(".")
        head, _, rest = path.rpartition("transformer_blocks.")
        block = f"{head}transformer_blocks.{rest.partition('.')[0]}"
        for name in ("", block):
            counts = found.setdefault(kind, {}).setdefault(name, {"off": 0, "all": 0})
            counts["off"] += int(mask.sum())
            counts["all"] += mask.numel()
    return found
