"""Which base model this is: shapes and a sample of weights, equal for fp32, fp16, mirror and single-file copies of one model."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArtifactError, NothingAttached, WrongBase
from .families import family_of
from .seams.weights import parameter, plain

ENTRIES = 256
TOLERANCE = 2.0**-7
"""Relative: bfloat16 keeps eight bits."""


def _named(module: nn.Module) -> dict[str, Tensor]:
    """Parameters without the prefix that transformers 4 has and transformers 5 has not, sorted by name."""
    named = {name.removeprefix("text_model."): p.detach() for name, p in module.named_parameters() if "lora_" not in name}
    return {name.replace(".base_layer.", "."): p for name, p in sorted(named.items())}


def _sample(named: dict[str, Tensor]) -> list[float]:
    """256 entries at places fixed by the shapes alone."""
    generator = torch.Generator().manual_seed(len(named))
    tensors = list(named.values())
    which = torch.randint(len(tensors), (ENTRIES,), generator=generator).tolist()
    where = torch.rand(ENTRIES, generator=generator).tolist()
    return [float(tensors[t].flatten()[int(share * tensors[t].numel())]) for t, share in zip(which, where, strict=True)]


def take(pipe: Any) -> dict[str, Any]:
    """Family, and for each denoiser and text encoder the hash of its table of shapes and its sampled entries."""
    family = family_of(pipe)
    components = {}
    for name in (*(name for name, _ in family.parts(pipe)), *(encoder.component for encoder in family.encoders)):
        if (module := getattr(pipe, name)) is None:  # some pipelines run without one of their text encoders
            continue
        named = _named(module)
        table = "\n".join(f"{key} {tuple(p.shape)}" for key, p in named.items())
        components[name] = {"shapes": hashlib.sha256(table.encode()).hexdigest(), "entries": [round(x, 8) for x in _sample(named)]}
    return {"family": family.name, "components": components}


def quantised(pipe: Any) -> set[str]:
    """Components whose weights a quantiser has replaced: nothing in them compares with the weights that they were made of."""
    family = family_of(pipe)
    names = (*(name for name, _ in family.parts(pipe)), *(encoder.component for encoder in family.encoders))
    return {name for name in names if (module := getattr(pipe, name)) is not None and not all(map(plain, module.parameters()))}


def check(pipe: Any, expected: Mapping[str, Any], source: str, component: str | None = None) -> list[str]:
    """Raise unless ``pipe`` is the base that ``expected`` was taken from; gives the quantised components, which are left out.

    At least one component must compare: the text encoders, as a rule, where the denoiser is quantised. ``component``: compare that alone,
    in whatever family of pipelines.
    """
    found, left_out = take(pipe), quantised(pipe)
    if component is not None:
        found, expected = _alone(found, component, "this pipeline"), _alone(expected, component, f"the base of {source}")
        left_out &= {component}
    elif found["family"] != expected["family"]:
        raise WrongBase(
            f"{source} was made for the family {expected['family']}, this pipeline is {found['family']}: "
            f"give its base, {expected.get('id')!r}, as --model"
        )
    if odd := sorted(found["components"].keys() ^ expected["components"].keys()):
        raise WrongBase(
            f"{source}: {', '.join(odd)} is in one alone of this pipeline and the base {expected.get('id')!r} that it was made for"
        )
    if left_out >= found["components"].keys():
        raise WrongBase(f"{source}: all of this pipeline's components are quantised, so none shows which base it was: load one unquantised")
    for name, theirs in expected["components"].items():
        if name in left_out:
            continue
        ours = found["components"][name]
        if ours["shapes"] != theirs["shapes"]:
            raise WrongBase(
                f"{source}: {name} has other layers or shapes than the base that it was made for: "
                f"give that, {expected.get('id')!r}, as --model"
            )
        a, b = torch.tensor(ours["entries"]), torch.tensor(theirs["entries"])
        scale = b.abs().clamp(min=float(b.abs().median()) * 0.1 + 1e-6)
        wrong = int(((a - b).abs() > TOLERANCE * scale).sum())
        if wrong:
            raise WrongBase(
                f"{source}: {wrong} of {ENTRIES} sampled weights of {name} differ from the base {expected.get('id')!r}: "
                "another model; give that base as --model"
            )
    return sorted(left_out)


def _alone(of: Mapping[str, Any], component: str, owner: str) -> dict[str, Any]:
    """A fingerprint of one component."""
    if component not in of["components"]:
        raise WrongBase(f"{owner} has no component {component!r}; it has {', '.join(of['components'])}")
    return {**of, "components": {component: of["components"][component]}}


def count_changed(pipe: Any, changed: Mapping[str, Tensor], source: str) -> int:
    """How many tensors of a weight eraser differ from the base; none is an error, since the model would stay as it is."""
    try:
        live = {name: parameter(pipe, name).detach() for name in changed}
    except NothingAttached as error:
        raise ArtifactError(f"{source}: {error}") from error
    for name, p in live.items():
        if p.shape != changed[name].shape:
            raise ArtifactError(f"{source}: {name} is {tuple(changed[name].shape)}, the base has {tuple(p.shape)}")
        if not changed[name].isfinite().all():
            raise ArtifactError(f"{source}: {name} holds values that are not finite")
    count = sum(not torch.equal(p, changed[name].to(p)) for name, p in live.items())
    if not count:
        raise ArtifactError(f"{source}: all {len(changed)} tensors equal the base's: the model would not change")
    return count
