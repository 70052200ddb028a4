"""What a check of the contract works with: a method on a tiny pipeline of one family."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..concept import Concept
from ..errors import ErasureError
from ..families import family_of
from ..method import Eraser, ErasureMethod, Run
from ..seams.prompt import encode_alone
from . import tiny

CONCEPT = Concept("dagger", targets=("dagger", "knife"), anchors=("cat",), retain=("boat",))
TARGET = "a photo of a dagger"
NEUTRAL = "the night sky with a big red cat on a boat"
VISIBLE = 0.02
"""Relative change of the latents from which on a tiny pipeline counts as edited; numerical noise is a thousand times smaller."""


@dataclass
class Subject:
    """A method class with its settings, on one family."""

    method: type[ErasureMethod]
    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    concept: Concept = CONCEPT
    _pipe: Any = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.method.name}-{self.family}"

    def build(self) -> Any:
        """A fresh tiny pipeline, the same every time."""
        return tiny.FAMILIES[self.family]()

    @property
    def pipe(self) -> Any:
        """A pipeline that the checks share: each leaves it as it found it, or a later one fails."""
        self._pipe = self._pipe or self.build()
        return self._pipe

    def fit(self, pipe: Any, concept: Concept | None = None) -> Eraser:
        return self.method.from_config(self.config).fit(pipe, [concept or self.concept], run=Run(progress=False))

    @property
    def target(self) -> str:
        """A prompt that names the concept."""
        return TARGET if self.concept is CONCEPT else f"a photo of a {self.concept.targets[0]}"


def state(pipe: Any) -> dict[str, Tensor]:
    """Copies of all weights of a pipeline."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}


def hooks(pipe: Any) -> int:
    """Forward hooks on all modules of a pipeline."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for part in parts for m in part.modules())


def trace(pipe: Any) -> tuple[set[str], int, dict[str, type]]:
    """Whatever an eraser could leave behind, weights apart: attributes, hooks, and attributes of the pipeline's parts."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    odd = {f"{name}.{key}": type(value) for name, part in parts.items() for key, value in vars(part).items() if key.startswith("_erasure")}
    return set(vars(pipe)), hooks(pipe), odd


def same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bit for bit, dtypes included."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def change(a: Tensor, b: Tensor) -> float:
    """Norm of a difference relative to ``b``."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def require(condition: object, message: str) -> None:
    """An assertion that ``python -O`` keeps."""
    if not condition:
        raise AssertionError(message)


@contextmanager
def raises(kind: type[Exception], containing: str = "") -> Iterator[None]:
    """Assert that the block raises an error of that kind whose message contains a text."""
    try:
        yield
    except kind as error:
        require(containing.lower() in str(error).lower(), f"the {kind.__name__} should say {containing!r}, it says: {error}")
        return
    raise AssertionError(f"nothing was raised, where {kind.__name__} was due")


def edited_or_raises(run: Callable[[], Tensor], base: Tensor, what: str) -> None:
    """Fail if ``run`` silently gives what the base gives: it may be edited, or refuse."""
    try:
        result = run()
    except ErasureError:
        return
    require(change(result, base) > VISIBLE, f"{what} gives the base's output in silence")


def given_embeds(pipe: Any, prompt: str) -> dict[str, Any]:
    """A prompt's embeddings as arguments of the pipeline's call, as the bare base encodes it."""
    family = family_of(pipe)
    options = {"max_sequence_length": tiny.T5_TOKENS} if family.name in ("sd3", "flux", "wan") else {}
    positive, negative = (encode_alone(pipe, family, [text], options) for text in (prompt, ""))
    found = {"prompt_embeds": positive["embeds"], "negative_prompt_embeds": negative["embeds"]}
    if family.pooled:
        found |= {"pooled_prompt_embeds": positive["pooled"], "negative_pooled_prompt_embeds": negative["pooled"]}
    return {**found, "negative_prompt": None}


class Int8Linear(nn.Linear):
    """A linear layer with int8 weights and a scale a row: what quantisers leave behind, in miniature."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        scale = linear.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        made.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        made.bias = linear.bias
        made.register_buffer("scale", scale)
        return made

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype) * self.get_buffer("scale").to(input.dtype), self.bias)


def quantise(pipe: Any) -> Any:
    """Quantise the linear layers of a pipeline's denoisers, in place."""
    for _, denoiser in family_of(pipe).parts(pipe):
        for parent in list(denoiser.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Int8Linear.of(child))
    return pipe
