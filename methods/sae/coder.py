"""Sparse autoencoders of activations: a few of many latents stand for each vector."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from erasure.errors import ErasureError

CONFIG, WEIGHTS = "config.json", "sae.safetensors"
Activation = Literal["topk", "abstopk", "relu"]


@dataclass(frozen=True, kw_only=True)
class SparseCoderConfig:
    """Shape of a coder, and where its activations come from."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    d_in: int
    """Width of the activations."""
    num_latents: int
    """Number of latents."""
    k: int = 64
    """Latents that may be on at once; ``relu`` takes no notice."""
    activation: Activation = "topk"
    """topk: the k largest, negative ones cut; abstopk: the k largest by size, with their sign; relu: every positive one."""
    hookpoint: str = ""
    """Dotted name of the module whose output it codes, with the component."""

    def __post_init__(self) -> None:
        if min(self.d_in, self.num_latents) < 1 or not 1 <= self.k <= self.num_latents:
            raise ErasureError(f"a coder needs a width, latents, and a k of at most these: {self.d_in}, {self.num_latents}, {self.k}")


class Coded(NamedTuple):
    """What a pass gives."""

    reconstruction: Tensor
    """[..., d_in]"""
    codes: Tensor
    """[..., num_latents]; zero where a latent is off."""
    pre: Tensor
    """[..., num_latents]: the latents before the activation."""


def topk(pre: Tensor, k: int) -> Tensor:
    """The k largest of each row [..., n] kept where they are positive, the rest 0."""
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())


def abstopk(pre: Tensor, k: int) -> Tensor:
    """The k of each row [..., n] that are largest by size, with their signs, the rest 0 (AbsTopK)."""
    indices = pre.abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(pre).scatter(-1, indices, pre.gather(-1, indices))


class SparseCoder(nn.Module):
    """codes = activation(W_enc (x - b_dec) + b_enc); x ~ codes W_dec + b_dec, with rows of W_dec [num_latents, d_in] of norm 1.

    The layout and the names of the tensors are sparsify's (EleutherAI): ``encoder.weight``, ``encoder.bias``, ``W_dec``, ``b_dec``, which
    is taken off before encoding, as there and in ItD's coder.
    """

    def __init__(self, config: SparseCoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Linear(config.d_in, config.num_latents)
        nn.init.zeros_(self.encoder.bias)
        self.W_dec = nn.Parameter(F.normalize(self.encoder.weight.detach().clone(), dim=-1))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))

    def pre(self, x: Tensor) -> Tensor:
        """Latents before the activation [..., num_latents] of x [..., d_in]; another width raises."""
        if x.shape[-1] != self.config.d_in:
            raise ErasureError(f"the coder was made for activations {self.config.d_in} wide, these are {x.shape[-1]}: another hookpoint?")
        out: Tensor = self.encoder(x - self.b_dec)
        return out

    def activate(self, pre: Tensor) -> Tensor:
        """Codes [..., num_latents] of latents before the activation."""
        if self.config.activation == "relu":
            return pre.relu()
        return (topk if self.config.activation == "topk" else abstopk)(pre, self.config.k)

    def encode(self, x: Tensor) -> Tensor:
        """Codes [..., num_latents] of x [..., d_in]."""
        return self.activate(self.pre(x))

    def decode(self, codes: Tensor) -> Tensor:
        """x [..., d_in] that codes [..., num_latents] stand for."""
        return codes @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Coded:
        pre = self.pre(x)
        codes = self.activate(pre)
        return Coded(self.decode(codes), codes, pre)

    @torch.no_grad()
    def normalise(self) -> None:
        """Bring each latent's direction to norm 1."""
        self.W_dec.copy_(F.normalize(self.W_dec, dim=-1))

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write configuration and weights."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        save_file({name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: str | Path) -> "SparseCoder":
        """Read what ``save`` wrote, in float32; a folder that is none, or whose weights do not fit its configuration, raises."""
        folder = Path(folder)
        try:
            config = TypeAdapter(SparseCoderConfig).validate_json((folder / CONFIG).read_bytes())
            return cls.of(config, load_file(folder / WEIGHTS))
        except (OSError, ValidationError, SafetensorError, RuntimeError) as error:
            raise ErasureError(f"{folder} is no folder of a sparse coder ({CONFIG}, {WEIGHTS}): {error}") from error

    @classmethod
    def of(cls, config: SparseCoderConfig, tensors: Mapping[str, Tensor]) -> "SparseCoder":
        """A fixed coder of tensors by their names in files, in float32; nothing is drawn at random."""
        with torch.device("meta"):
            coder = cls(config)
        coder.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
        return coder.eval().requires_grad_(False)
