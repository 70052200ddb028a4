"""The embedded model end to end: it draws what prompts say, erasers take it away, and its files are what other tools read."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import erasure
from erasure.canvas.concepts import canvas_concept
from erasure.canvas.judge_dev import judge_dev
from erasure.canvas.judge_test import judge_test
from erasure.canvas.world import fill, world
from erasure.errors import ErasureError, UnknownName
from erasure.methods.uce import UCE

WEIGHTS = Path(erasure.__file__).parent / "canvas/weights"
OBJECTS = ("bomb", "pizza", "rocket", "penguin", "guitar", "apple", "crown", "sunflower")


@pytest.fixture(scope="module")
def pipe():
    pipe = erasure.load_base("canvas", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts: list[str], steps: int = 20) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(100_000 + i) for i in range(len(prompts))]
    return pipe(prompts, num_inference_steps=steps, guidance_scale=4.0, generator=generators, output_type="pt").images


def prompts(names: tuple[str, ...]) -> tuple[list[str], list[str], list[str]]:
    of = world()
    styles = [of.styles[i % 4] for i in range(len(names))]
    backgrounds = [of.backgrounds[i % 8] for i in range(len(names))]
    template = of.templates("dev")[0]
    texts = [fill(template, of.noun(o), s, b) for o, s, b in zip(names, styles, backgrounds, strict=True)]
    return texts, styles, backgrounds


def test_it_draws_what_prompts_say(pipe):
    texts, styles, backgrounds = prompts(OBJECTS * 2)
    verdict = judge_dev()(draw(pipe, texts))
    present = [bool(verdict.present[i, world().objects.index(o)]) for i, o in enumerate(OBJECTS * 2)]
    assert sum(present) >= 11, present  # of 16; the bar itself is printed by scripts/check_canvas.py
    assert sum(world().styles[int(s)] == asked for s, asked in zip(verdict.style, styles, strict=True)) >= 13
    assert sum(world().backgrounds[int(b)] == asked for b, asked in zip(verdict.background, backgrounds, strict=True)) >= 14


def test_uce_takes_the_dagger_away_and_gives_it_back(pipe):
    texts = [fill(t, "a dagger", s, "mint") for t in world().templates("dev") for s in world().styles]
    index = world().objects.index("dagger")
    before = draw(pipe, texts)
    eraser = UCE().fit(pipe, [canvas_concept("dagger")])
    with eraser.attach(pipe):
        edited = draw(pipe, texts)
    assert torch.equal(draw(pipe, texts), before)
    there, left = (int(judge_dev()(images).present[:, index].sum()) for images in (before, edited))
    assert left <= there - 3, (there, left)


def test_the_judges_differ_and_refuse_what_they_cannot_read(pipe):
    assert not {type(m) for m in judge_dev().net.trunk.modules()} >= {type(m) for m in judge_test().net.trunk.modules()}
    with pytest.raises(ValueError, match="64, 64"):
        judge_test()(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no images"):
        judge_test()(torch.zeros(0, 3, 64, 64))
    noise = judge_test()(torch.rand(32, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert noise.unrecognised.all() and not noise.present.any()


def test_text_encoder_keys_are_the_ones_that_transformers_4_and_5_both_read():
    with safe_open(WEIGHTS / "canvas/text_encoder/model.safetensors", "pt") as file:
        keys = set(file.keys())
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    layer = {f"{p}.{x}" for p in (*attention, "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2") for x in ("weight", "bias")}
    frozen = {f"text_model.encoder.layers.{i}.{name}" for i in range(3) for name in layer}
    frozen |= {"text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight"}
    frozen |= {"text_model.final_layer_norm.weight", "text_model.final_layer_norm.bias"}
    assert keys == frozen


def test_no_pickle_ships_and_it_is_small():
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt"}
    assert sum(p.stat().st_size for p in files) < 70e6


def test_tokenizer_knows_every_word_and_pads_like_clip(pipe):
    ids = pipe.tokenizer("! a dagger", padding="max_length", return_tensors="pt").input_ids[0]
    assert pipe.tokenizer.convert_tokens_to_ids("!") == 0
    assert int(ids[0]) == pipe.tokenizer.bos_token_id and int(ids[-1]) == pipe.tokenizer.eos_token_id
    unknown = [w for o in world().objects for w in (o, *world().synonyms(o)) if len(pipe.tokenizer.tokenize(w)) > 3 * len(w.split())]
    assert not unknown


def test_bases_that_cannot_be_loaded_say_why(tmp_path):
    with pytest.raises(ErasureError, match="pickle"):
        erasure.load_base("model.ckpt")
    with pytest.raises(ErasureError, match=r"no model .* Known: canvas"):
        erasure.load_base(str(tmp_path / "nothing"))
    with pytest.raises(ErasureError, match="no checkpoint file"):
        erasure.load_base(str(tmp_path / "gone.safetensors"))
    (tmp_path / "bare.safetensors").write_bytes(b"")
    with pytest.raises(ErasureError, match="--base-config"):
        erasure.load_base(str(tmp_path / "bare.safetensors"))
    with pytest.raises(ErasureError, match="dtype"):
        erasure.load_base("canvas", dtype="int8")
    with pytest.raises(UnknownName, match="did you mean dagger"):
        canvas_concept("dager")


def test_a_diffusers_folder_is_a_base_and_its_artefact_loads_onto_the_embedded_one(pipe, tmp_path):
    folder = tmp_path / "mine"
    pipe.save_pretrained(folder)
    mine = erasure.load_base(str(folder), device="cpu")
    eraser = UCE().fit(mine, [canvas_concept("bomb")])
    eraser.save(tmp_path / "artefact", pipe=mine, base_id="mine")
    loaded = erasure.load(tmp_path / "artefact", base=erasure.load_base("canvas", device="cpu"))
    loaded.set_progress_bar_config(disable=True)
    with eraser.attach(mine):
        mine.set_progress_bar_config(disable=True)
        assert torch.equal(draw(mine, ["a bomb"], steps=2), draw(loaded, ["a bomb"], steps=2))
