"""``lora``: the change of the weights by truncated SVD, in diffusers' format and under the names that web UIs read."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_kohya, logging
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapter import AdapterEraser
from ..errors import ErasureError
from ..families import family_of
from ..lora import LORA, file_name
from ..lora import write as write_adapter
from ..method import Eraser
from .folding import Notes, change
from .original import UNET_RESNET, unet_layers

DEVIATION = 0.5
"""How far the LoRA's canary may be from the attached eraser's, as a share of what the eraser changes: farther is not erased any more."""
WEB = ("sd1", "sd2", "sdxl")
"""Families whose LoRA files web UIs read by kohya's names."""


def check_options(rank: int | None, error: float | None, adapter: bool) -> None:
    """Raise unless a rank or an error says how much to keep; a LoRA eraser has its own rank."""
    if adapter:
        if rank is not None or error is not None:
            raise ErasureError("the artefact is a LoRA already and is exported as it is; leave rank and error out")
    elif (rank is None) == (error is None):
        raise ErasureError("a LoRA holds the change of the weights at a rank: give either rank (such as 16) or error (such as 0.05)")
    elif rank is not None and rank < 1:
        raise ErasureError(f"a LoRA's rank is at least 1, not {rank}")
    elif error is not None and not 0 < error < 1:
        raise ErasureError(f"error is the share of the change that may be lost, between 0 and 1, not {error:g}")


def factorise(weight: Tensor, rank: int | None, error: float | None) -> tuple[Tensor, Tensor, float]:
    """B [out, r] and A [r, in] with B A near ``weight`` [out, in], and what is lost of its Frobenius norm, relative.

    Of a convolution's [out, in, height, width], B is [out, r, 1, 1] and A [r, in, height, width]. The best approximation at its rank
    (Eckart and Young, 1936): ``rank``, or the smallest that loses at most ``error``.
    """
    left, values, right = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    tail = values.square().flip(0).cumsum(0).flip(0)  # tail[r]: what rank r loses, squared
    lost = torch.cat([tail, tail.new_zeros(1)]).sqrt() / values.norm().clamp(min=torch.finfo(values.dtype).tiny)
    if rank is None:
        assert error is not None
        rank = int((lost <= error).nonzero()[0])
    rank = max(1, min(rank, int((values > values[0] * 1e-7).sum())))
    root = values[:rank].sqrt()
    b, a = left[:, :rank] * root, root[:, None] * right[:rank]
    return b.reshape(*b.shape, *(1 for _ in weight.shape[2:])), a.reshape(rank, *weight.shape[1:]), float(lost[rank])


def write(
    eraser: Eraser, new: dict[str, Tensor], pipe: Any, folder: Path, name: str, rank: int | None, error: float | None, dtype: torch.dtype
) -> Notes:
    """Write the LoRA, and a second file by kohya's names where web UIs read the family."""
    report: dict[str, Any] = {}
    remedy = "Raise rank, or lower error."
    if isinstance(eraser, AdapterEraser):
        factors, remedy = eraser.tensors(), "Some of its layers do not come back from that file: use --format full."
    else:
        factors, report = _approximate(change(new, pipe), pipe, rank, error)
    factors = {key: tensor.to(dtype) for key, tensor in factors.items()}
    ranks = [len(tensor) for key, tensor in factors.items() if "lora_A" in key]
    report |= {"layers": len(ranks), "rank": [min(ranks), max(ranks)]}
    write_adapter(factors, folder)
    files, usage = [LORA], USAGE
    if family_of(pipe).name in WEB:
        files.append(f"{name}-webui.safetensors")
        save_file(web_names(factors, pipe), folder / files[-1], metadata=_web_header(ranks))
        usage += WEB_USAGE.format(file=files[-1])
    checks = {file: _reader(pipe, folder, file) for file in files}
    return Notes(usage, checks, report, remedy)


USAGE = """```python
pipe.load_lora_weights("THIS_FOLDER")  # of the base; weight 1.0 is the eraser, any other is not
```
"""
WEB_USAGE = """
For web UIs: `{file}`, in the folder of LoRA models, at weight 1. Whoever leaves it out, or lowers its weight, has the unerased base.
"""


def _approximate(
    changes: Mapping[str, Tensor], pipe: Any, rank: int | None, error: float | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Factors by diffusers' keys, and how much they lose: of all changes together, and of the worst layer."""
    _check_layers(changes, pipe)
    factors, lost, worst = {}, 0.0, 0.0
    for key, tensor in changes.items():
        component, _, layer = key.removesuffix(".weight").partition(".")
        b, a, missing = factorise(tensor, rank, error)
        stem = f"{component}.{file_name(component, layer)}"
        factors[f"{stem}.lora_A.weight"], factors[f"{stem}.lora_B.weight"] = a.float(), b.float()
        lost, worst = lost + (missing * float(tensor.norm())) ** 2, max(worst, missing)
    total = math.sqrt(sum(float(tensor.norm()) ** 2 for tensor in changes.values()))
    return factors, {"error": round(math.sqrt(lost) / total, 6), "worst_layer": round(worst, 6)}


def _check_layers(changes: Mapping[str, Tensor], pipe: Any) -> None:
    """Raise where a change is none that a LoRA can express: it would erase less than it claims."""
    bad = []
    for key in changes:
        component, _, path = key.partition(".")
        layer = getattr(pipe, component).get_submodule(path.rpartition(".")[0])
        plain = isinstance(layer, nn.Linear | nn.Conv2d) and path.endswith(".weight") and getattr(layer, "groups", 1) == 1
        if not plain or component not in getattr(pipe, "_lora_loadable_modules", ()):
            bad.append(key)
    if bad:
        names = ", ".join(bad[:5]) + (f" and {len(bad) - 5} others" if len(bad) > 5 else "")
        raise ErasureError(
            f"a LoRA cannot hold the change of {names}: it holds weights of linear and convolution layers of the components that diffusers "
            "loads LoRA into, no biases, norms or embeddings. Use --format full, delta or single"
        )


def web_names(factors: Mapping[str, Tensor], pipe: Any) -> dict[str, Tensor]:
    """The same LoRA by kohya's names; with one text encoder its prefix is lora_te, with two lora_te1 and lora_te2.

    The UNet of SDXL has its original names there, as from kohya's trainer: of diffusers' own, A1111 and diffusers do not know
    add_embedding, and A1111 looks for the first upsampler where SD 1 has it. Readers multiply by alpha / rank of the layer. Alpha is one
    for all layers, the highest rank, since diffusers 0.42 takes the most common alpha of such a file for all of them; both factors make up
    for it by the root, since one alone would be too small for float16 where ranks differ much.
    """
    xl = family_of(pipe).name == "sdxl"
    named = convert_state_dict_to_kohya({_original(pipe.unet, key) if xl else key: tensor for key, tensor in factors.items()})
    alpha = max(int(rank) for key, rank in named.items() if key.endswith(".alpha"))
    for key in [key for key in named if key.endswith(".alpha")]:
        share = math.sqrt(int(named[key]) / alpha)
        for side in ("down", "up"):
            factor = f"{key.removesuffix('alpha')}lora_{side}.weight"
            named[factor] = share * named[factor]
        named[key] = torch.tensor(float(alpha))
    if not xl:
        named = {key.replace("lora_te1_", "lora_te_", 1): tensor for key, tensor in named.items()}
    return {key: tensor.contiguous() for key, tensor in named.items()}


def _original(unet: Any, key: str) -> str:
    """The key of a UNet's factor with the layer's name in the original code; keys of other components are as before."""
    component, _, path = key.partition(".")
    if component != "unet":
        return key
    for ours, theirs in unet_layers(unet):
        if path.startswith(f"{ours}."):
            inner, _, rest = path.removeprefix(f"{ours}.").partition(".")
            return f"{component}.{theirs}.{UNET_RESNET.get(inner, inner)}.{rest}"
    raise ErasureError(f"web UIs know no layer of {key}: the original UNet has no name for it; use --format full")


def _web_header(ranks: list[int]) -> dict[str, str]:
    return {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(max(ranks)), "ss_network_alpha": str(max(ranks))}


def _reader(pipe: Any, folder: Path, file: str) -> Any:
    @contextmanager
    def read_back() -> Iterator[Any]:
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # diffusers warns of each component that has no LoRA
        try:
            pipe.load_lora_weights(str(folder), weight_name=file, adapter_name="export")
            yield pipe
        finally:
            logging.set_verbosity(level)
            pipe.unload_lora_weights()

    return read_back
