"""What is exported gives, in plain diffusers, the latents of the attached eraser."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import erasure
from erasure import artifact, lora
from erasure.errors import ErasureError, NoArtifact
from erasure.export import Options, export
from erasure.export import delta as delta_format
from erasure.export import lora as lora_format
from erasure.lora import LORA
from erasure.registry import methods
from tests import tiny
from tests.export.common import FAMILIES, KINDS, PROMPT, LowRank, near, same, save, sdxl, state
from tests.stand_ins import RandomLoRA
from tests.tiny import latents


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3", "flux", "wan"])
def test_full_is_a_plain_diffusers_folder(family: str, kind: str, tmp_path: Path) -> None:
    pipe = tiny.FAMILIES[family]()
    method = KINDS[kind] if family != "wan" else RandomLoRA(layers="attn", size=0.05) if kind == "adapter" else LowRank()
    folder, wanted = save(method, pipe, tmp_path / "artefact")
    base, before = latents(pipe, PROMPT), state(pipe)
    report = export(folder, pipe, tmp_path / "out", "full")
    assert same(pipe, before) and report["deviation"]["model_index.json"] < 0.01
    again = DiffusionPipeline.from_pretrained(tmp_path / "out", use_safetensors=True)
    again.set_progress_bar_config(disable=True)
    near(latents(again, PROMPT), wanted, base, 0.01)
    assert not any(hasattr(module, "peft_config") for module in again.components.values())
    assert {p.suffix for p in (tmp_path / "out").rglob("*") if p.is_file()} <= {".safetensors", ".json", ".txt", ".md", ".model"}
    config = json.loads((tmp_path / "out/erasure_config.json").read_text())
    assert (config["export"]["format"] == "full" and "unet/config.json" in config["files"]) or "transformer/config.json" in config["files"]
    with pytest.raises(NoArtifact, match="is an export"):
        erasure.load(tmp_path / "out", base=pipe)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_delta_is_applied_by_its_documented_snippet(family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.FAMILIES[family]()
    folder, wanted = save(KINDS[kind], pipe, tmp_path / "artefact")
    export(folder, pipe, tmp_path / "out", "delta")
    readme = (tmp_path / "out/README.md").read_text()
    snippet = readme.split("```python\n")[1].split("```")[0]
    assert len(snippet.splitlines()) == 6
    monkeypatch.chdir(tmp_path / "out")
    plain = tiny.FAMILIES[family]()
    base = latents(plain, PROMPT)
    exec(snippet, {"pipe": plain})
    near(latents(plain, PROMPT), wanted, base, 0.01)
    with safe_open(tmp_path / "out/delta.safetensors", "pt") as file:
        header = file.metadata()
    assert header["erasure_concepts"] == '["dagger"]' and header["base_model"] == "tiny" and len(header["base_fingerprint_sha256"]) == 64
    assert header == delta_format.identity(artifact.read_config(folder))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_lora_holds_a_change_of_its_rank_exactly(family: str, tmp_path: Path) -> None:
    pipe = FAMILIES[family]()
    folder, wanted = save(LowRank(encoder=True, convolutions=family in ("sd1", "sdxl")), pipe, tmp_path / "artefact")
    base, before = latents(pipe, PROMPT), state(pipe)
    report = export(folder, pipe, tmp_path / "out", "lora", Options(rank=2))
    assert report["rank"] == [2, 2] and report["error"] < 1e-5 and same(pipe, before)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files == (["out-webui.safetensors", LORA] if family in lora_format.WEB else [LORA])
    for options in ({}, *({"weight_name": name} for name in files)):
        plain = FAMILIES[family]()
        plain.load_lora_weights(str(tmp_path / "out"), **options)
        near(latents(plain, PROMPT), wanted, base, 0.01)
        plain.fuse_lora(components=list(plain.get_list_adapters()))
        plain.unload_lora_weights()
        near(latents(plain, PROMPT), wanted, base, 0.01)


@pytest.mark.parametrize(("share", "rank"), [(0.7, 1), (0.3, None), (0.02, None)])
def test_lora_by_error_takes_the_smallest_rank_of_each_layer(share: float, rank: int | None, tmp_path: Path) -> None:
    pipe = tiny.sdxl()
    folder, _ = save(methods.get("uce")(), pipe, tmp_path / "artefact")
    changes = {name: new - pipe.unet.get_parameter(name[5:]) for name, new in artifact.load_eraser(folder)[0].tensors().items()}
    report = export(folder, pipe, tmp_path / "out", "lora", Options(error=share)) if share < 0.5 else None
    ranks, lost = [], []
    for change in changes.values():
        _, a, missing = lora_format.factorise(change, None, share)
        values = torch.linalg.svdvals(change.double())
        assert missing <= share < float(values[len(a) - 1 :].norm() / values.norm()), "one rank less would miss it"
        ranks.append(len(a))
        lost.append(missing)
    if report is not None:
        assert report["rank"] == [min(ranks), max(ranks)] and report["error"] <= report["worst_layer"] <= share
        assert report["worst_layer"] == pytest.approx(max(lost), abs=1e-4)
        shapes = {key: t.shape for key, t in load_file(tmp_path / "out" / LORA).items() if "lora_A" in key}
        assert sorted(shape[0] for shape in shapes.values()) == sorted(ranks)


@given(rows=st.integers(1, 8), columns=st.integers(1, 8), rank=st.integers(1, 9), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_no_other_matrix_of_the_rank_is_nearer(rows: int, columns: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    b, a, lost = lora_format.factorise(matrix, rank, None)
    assert b.shape[1] == len(a) == min(rank, rows, columns)
    error = (b @ a - matrix).norm()
    torch.testing.assert_close(error, lost * matrix.norm(), rtol=1e-6, atol=1e-9)
    other = torch.randn(rows, len(a), generator=generator, dtype=torch.float64)
    assert error <= (matrix - other @ torch.linalg.lstsq(other, matrix).solution).norm() + 1e-9


def test_ranks_that_differ_load_right_from_both_files(tmp_path: Path) -> None:
    """Diffusers takes the most common alpha of a kohya file for every layer, and web UIs take each layer's own: both must be right."""
    pipe = sdxl()
    folder, wanted = save(RandomLoRA(encoders=True, size=0.05), pipe, tmp_path / "artefact")
    report = export(folder, pipe, tmp_path / "out", "lora")
    assert report["rank"] == [2, 3]
    web, ours = load_file(tmp_path / "out/out-webui.safetensors"), load_file(tmp_path / "out" / LORA)
    assert len({float(t) for key, t in web.items() if key.endswith(".alpha")}) == 1
    for key, a in ours.items():
        if key.endswith("lora_A.weight"):
            layer = key.removesuffix(".lora_A.weight")
            stem = lora_format._original(pipe.unet, key).removesuffix(".lora_A.weight").replace(".", "_")
            stem = f"lora_{stem.replace('text_encoder', 'te1')}"
            down, up, alpha = web[f"{stem}.lora_down.weight"], web[f"{stem}.lora_up.weight"], float(web[f"{stem}.alpha"])
            torch.testing.assert_close(alpha / len(down) * up @ down, ours[f"{layer}.lora_B.weight"] @ a)  # as web UIs reckon
    plain = sdxl()
    base = latents(plain, PROMPT)
    plain.load_lora_weights(str(tmp_path / "out"), weight_name="out-webui.safetensors")
    near(latents(plain, PROMPT), wanted, base, 0.01)


def test_every_linear_layer_of_sdxl_comes_back_from_the_web_uis_file(tmp_path: Path) -> None:
    """Among them those of add_embedding, whose diffusers name no reader of such files knows."""
    pipe = sdxl()
    folder, _ = save(RandomLoRA(layers="", encoders=True, size=0.02), pipe, tmp_path / "artefact")
    report = export(folder, pipe, tmp_path / "out", "lora")
    web = load_file(tmp_path / "out/out-webui.safetensors")
    assert {"lora_unet_label_emb_0_0.alpha", "lora_unet_label_emb_0_2.alpha"} < web.keys()
    assert max(report["deviation"].values()) < 1e-3


def test_a_small_rank_beside_a_large_one_is_still_normal_in_half_precision() -> None:
    layer, other = (f"unet.{block}.attentions.0.transformer_blocks.0.attn2.to_k" for block in ("mid_block", "down_blocks.0"))
    draw = torch.Generator().manual_seed(0)
    shapes = {layer: (8, 1, 16), other: (1024, 1024, 1024)}
    factors = {}
    for name, (out, rank, width) in shapes.items():
        factors[f"{name}.lora_A.weight"] = 0.01 * torch.randn(rank, width, generator=draw)
        factors[f"{name}.lora_B.weight"] = 0.01 * torch.randn(out, rank, generator=draw)
    web = lora_format.web_names({key: tensor.half() for key, tensor in factors.items()}, tiny.sd1())
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    made = float(web[f"{stem}.alpha"]) * web[f"{stem}.lora_up.weight"].double() @ web[f"{stem}.lora_down.weight"].double()
    wanted = factors[f"{layer}.lora_B.weight"].double() @ factors[f"{layer}.lora_A.weight"].double()
    assert float((made - wanted).norm() / wanted.norm()) < 1e-3


def test_a_lora_eraser_is_exported_as_its_own_file(tmp_path: Path) -> None:
    pipe = tiny.flux()
    folder, _ = save(RandomLoRA(layers="attn", size=0.05), pipe, tmp_path / "artefact")
    export(folder, pipe, tmp_path / "out", "lora")
    theirs, ours = load_file(folder / LORA), load_file(tmp_path / "out" / LORA)
    assert theirs.keys() == ours.keys() and all(torch.equal(t, ours[key]) for key, t in theirs.items())
    lora.check_metadata(tmp_path / "out" / LORA, ours)
    with pytest.raises(ErasureError, match="is a LoRA already"):
        export(folder, pipe, tmp_path / "out", "lora", Options(rank=2))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_single_loads_by_from_single_file(family: str, kind: str, dtype: str, tmp_path: Path) -> None:
    pipe = tiny.FAMILIES[family]()
    folder, wanted = save(KINDS[kind], pipe, tmp_path / "artefact")
    base, before = latents(pipe, PROMPT), state(pipe)
    export(folder, pipe, tmp_path / "out", "single", Options(dtype=dtype))
    assert same(pipe, before)
    path = tmp_path / "out/out.safetensors"
    cls = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    again = cls.from_single_file(str(path), config=str(tmp_path / "out/config"), local_files_only=True)
    again.set_progress_bar_config(disable=True)
    near(latents(again, PROMPT), wanted, base, 0.001 if dtype == "float32" else 0.1)
    image, decoded = (p.vae.decode(wanted / 8, return_dict=False)[0] for p in (pipe, again))
    torch.testing.assert_close(decoded, image, rtol=0.05, atol=0.01 if dtype == "float16" else 1e-6)
    tensors = load_file(path)
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{dtype}"}
    assert {key.split(".")[0] for key in tensors} == {
        "model",
        "first_stage_model",
        "conditioner" if family == "sdxl" else "cond_stage_model",
    }
