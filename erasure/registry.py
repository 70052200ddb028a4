"""Names to objects, imported only when asked for, open to other packages through entry points."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple, get_args, get_type_hints

from .errors import ErasureError, UnknownName


def unknown(what: str, name: str, known: Iterable[str], hint: str = "") -> UnknownName:
    """The error for a name that nobody has, with the nearest known ones."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    guess = f"; did you mean {' or '.join(near)}?" if near else ""
    return UnknownName(f"no {what} {name!r}{guess or '.'} Known: {', '.join(known) or 'none'}{'; ' + hint if hint else ''}")


class Entry(NamedTuple):
    """What is known of a name without importing it."""

    path: str
    """``"module:object"``."""
    summary: str
    kind: str = ""
    """How it acts: kind of the erasers that a method fits."""
    families: str = ""
    """Rows of families.py that it supports, separated by spaces."""


@dataclass
class Registry:
    """Lazy names: built-ins from a static table, plug-ins from an entry-point group."""

    what: str
    group: str
    builtin: dict[str, Entry] = field(default_factory=dict)

    @cached_property
    def plugins(self) -> dict[str, EntryPoint]:
        return {p.name: p for p in entry_points(group=self.group) if p.name not in self.builtin}

    def names(self) -> list[str]:
        return [*self.builtin, *sorted(self.plugins)]

    def get(self, name: str) -> Any:
        """The object of that name; unknown names raise with a suggestion, broken plug-ins with their own error."""
        if name in self.builtin:
            module, _, attribute = self.builtin[name].path.partition(":")
            return getattr(import_module(module), attribute)
        if name in self.plugins:
            try:
                return self.plugins[name].load()
            except Exception as error:
                raise ErasureError(f"the plug-in {name!r} ({self.plugins[name].value}) does not load: {error}") from error
        raise unknown(self.what, name, self.names())

    def entries(self) -> dict[str, Entry]:
        """Every name; a plug-in is loaded to describe it, and a broken one is listed with its error and breaks nothing."""
        return self.builtin | {name: self._describe(name) for name in sorted(self.plugins)}

    def summaries(self) -> dict[str, str]:
        """Each name with one line on it."""
        return {name: entry.summary for name, entry in self.entries().items()}

    def _describe(self, name: str) -> Entry:
        path = self.plugins[name].value
        try:
            found = self.get(name)
        except ErasureError as error:
            return Entry(path, f"broken: {error}")
        return Entry(path, (found.__doc__ or "").strip().split("\n")[0], kind_of(found), " ".join(sorted(getattr(found, "families", ()))))


def kind_of(method: Any) -> str:
    """The kind of the erasers that a method class says it fits, "" where it does not say."""
    try:
        fitted = get_type_hints(method.fit).get("return")
        return " or ".join(kind for each in get_args(fitted) or (fitted,) if (kind := getattr(each, "kind", "")))
    except (AttributeError, NameError, TypeError):
        return ""


FAMILIES = "sd1 sd2 sdxl sd3 flux wan"
"""All of families.py, which this module does not import: a list of methods does not wait for torch."""
TRAINED = "sd1 sd2 sdxl sd3 flux"
"""Those that the trained methods have samplers and losses for."""

methods = Registry(
    "method",
    "erasure.methods",
    {
        "negative_prompt": Entry(
            "erasure.methods.negative_prompt:NegativePrompt",
            "The concept as negative prompt: the baseline of every table",
            "runtime",
            FAMILIES,
        ),
        "uce": Entry(
            "erasure.methods.uce:UCE", "Unified Concept Editing: cross-attention keys and values in closed form", "weights", FAMILIES
        ),
        "safree": Entry(
            "erasure.methods.safree:SAFREE", "SAFREE: prompts projected off the concept's subspace, with re-attention", "runtime", FAMILIES
        ),
        "itd": Entry(
            "erasure.methods.itd:ItD", "Interpret-then-Deactivate: sparse features of the text encoder, switched off", "runtime", FAMILIES
        ),
        "sld": Entry(
            "erasure.methods.sld:SLD",
            "Safe Latent Diffusion: guidance away from the concept's text, with warm-up and momentum",
            "runtime",
            FAMILIES,
        ),
        "perp_neg": Entry(
            "erasure.methods.perp_neg:PerpNeg",
            "Perp-Neg: a negative prompt that leaves alone what the prompt asks for",
            "runtime",
            FAMILIES,
        ),
        "esd": Entry(
            "erasure.methods.esd:ESD",
            "Erased Stable Diffusion: trained to predict the concept as guided away from it",
            "weights or adapter",
            TRAINED,
        ),
        "concept_ablation": Entry(
            "erasure.methods.concept_ablation:ConceptAblation",
            "Concept Ablation: trained to see the anchor where the concept is named",
            "weights or adapter",
            TRAINED,
        ),
        "salun": Entry(
            "erasure.methods.salun:SalUn",
            "SalUn: relabelling by the anchor, on the weights that matter most for the concept",
            "weights",
            TRAINED,
        ),
        "adv_unlearn": Entry(
            "erasure.methods.adv_unlearn:AdvUnlearn",
            "AdvUnlearn: the text encoder trained against attacks on the prompt's token embeddings",
            "weights",
            TRAINED,
        ),
        "safety_dpo": Entry(
            "erasure.methods.safety_dpo:SafetyDPO",
            "SafetyDPO: a LoRA expert that prefers the base's safe image to its unsafe one; experts merge",
            "weights or adapter",
            TRAINED,
        ),
        "gs_lora": Entry(
            "erasure.methods.gs_lora:GSLoRA",
            "GS-LoRA, our transfer to diffusion: group-sparse LoRA on feed-forward layers, concepts forgotten one after another",
            "adapter",
            TRAINED,
        ),
        "minimalist": Entry(
            "erasure.methods.masking:Minimalist",
            "Minimalist Concept Erasure: the fewest heads, neurons and norms switched off, trained through the whole sampler",
            "weights",
            TRAINED,
        ),
        "conceptprune": Entry(
            "erasure.methods.conceptprune:ConceptPrune",
            "ConceptPrune: feed-forward weights that the concept excites more than other prompts, pruned",
            "weights",
            TRAINED,
        ),
        "ssd_diffusion": Entry(
            "erasure.methods.ssd:SSD",
            "Selective synaptic dampening, our transfer to diffusion: weights that matter most for the concept, shrunk",
            "weights",
            TRAINED,
        ),
        "saeuron": Entry(
            "erasure.methods.saeuron:SAeUron",
            "SAeUron: features of a sparse autoencoder in the UNet, ablated while sampling",
            "runtime",
            "sd1 sd2 sdxl",
        ),
    },
)
