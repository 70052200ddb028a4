"""Coders of EleutherAI's sparsify and of dictionary_learning: their sums by hand, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from erasure.errors import ErasureError
from erasure.methods.sae.formats import is_coder, load

D, N, K = 6, 20, 3
NAME = "text_encoder.layers.1"


def tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (N, D), "encoder.bias": (N,), "W_dec": (N, D), "b_dec": (D,)}
    return {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}


def by_hand(x: Tensor, k: int | None) -> Tensor:
    of = {name: value.double() for name, value in tensors().items()}
    codes = ((x.double() - of["b_dec"]) @ of["encoder.weight"].T + of["encoder.bias"]).relu()
    if k is not None:
        for row in codes:
            row[row.argsort(descending=True)[k:]] = 0
    return (codes @ of["W_dec"] + of["b_dec"]).float()


def sparsify(folder: Path, **more: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": K, "multi_topk": False}
    (folder / "cfg.json").write_text(json.dumps({**config, "skip_connection": False, "transcode": False, "d_in": D, **more}))
    save_file(tensors(), folder / "sae.safetensors")
    return folder


def dictionary(folder: Path, kind: str = "AutoEncoderTopK", extra: Any = None) -> Path:
    folder.mkdir(parents=True)
    own = tensors()
    state: dict[str, Any] = {"encoder.weight": own["encoder.weight"], "encoder.bias": own["encoder.bias"], "decoder.weight": own["W_dec"].T}
    state |= (
        {"b_dec": own["b_dec"], "k": torch.tensor(K), "threshold": torch.tensor(-1.0)} if kind != "AutoEncoder" else {"bias": own["b_dec"]}
    )
    torch.save(state if extra is None else extra, folder / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": N, "k": K, "submodule_name": "resid_post_layer_1"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"d_submodule": D}}))
    return folder


@pytest.mark.parametrize(("make", "k"), [(sparsify, K), (dictionary, K), (lambda folder: dictionary(folder, "AutoEncoder"), None)])
def test_a_foreign_coder_gives_what_its_own_tool_would(make: Any, k: int | None, tmp_path: Path) -> None:
    folder = make(tmp_path / NAME)
    coder = load(folder)
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(coder(x).reconstruction, by_hand(x, k), atol=1e-5, rtol=1e-5)
    assert coder.config.hookpoint == NAME and is_coder(folder) and not is_coder(tmp_path)


@pytest.mark.parametrize("odd", [{"transcode": True}, {"skip_connection": True}, {"activation": "groupmax"}])
def test_other_sums_are_refused(odd: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ErasureError, match="computes something else"):
        load(sparsify(tmp_path / NAME, **odd))
    with pytest.raises(ErasureError, match="GatedAutoEncoder of dictionary_learning is not known"):
        load(dictionary(tmp_path / "other" / NAME, "GatedAutoEncoder"))


class Payload:
    """What a pickle could run."""

    def __reduce__(self) -> Any:
        return (print, ("ran",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ErasureError, match="not a readable coder of another tool"):
        load(dictionary(tmp_path / NAME, extra={"encoder.weight": Payload()}))
    assert "ran" not in capsys.readouterr().out


def test_a_folder_without_its_hookpoint_in_the_name_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ErasureError, match="rename the folder to the hookpoint"):
        load(sparsify(tmp_path / "my-sae"))
