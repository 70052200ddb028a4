"""Each row of the table against the installed diffusers: the day it changes, one test names the row and the column."""

import ast
import inspect
import textwrap
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from erasure.errors import UnsupportedFamily
from erasure.families import NAMES, TABLE, Family, family_of
from erasure.testing.tiny import FAMILIES, latents
from erasure.text import encode, places, states, token_ids

ROWS = {f"{family.name}-{name}": (family, getattr(diffusers, name)) for family in TABLE for name in family.pipelines}
RETURNED = {
    "embeds": "prompt_embeds",
    "negative_embeds": "negative_prompt_embeds",
    "pooled": "pooled_prompt_embeds",
    "negative_pooled": "negative_pooled_prompt_embeds",
    "text_ids": "text_ids",
}
"""Our names of what ``encode_prompt`` returns, and its own."""

every = pytest.mark.parametrize("row", ROWS)


def source(function: Any) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    return tree


def calls(tree: ast.AST) -> list[str]:
    """Dotted names of what is called, in the order of the text."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [ast.unparse(node.func) for node in sorted(found, key=lambda node: (node.lineno, node.col_offset))]


@every
def test_encode_prompt_returns_what_the_row_says(row: str) -> None:
    family, pipeline = ROWS[row]
    returns = [node.value for node in ast.walk(source(pipeline.encode_prompt)) if isinstance(node, ast.Return) and node.value is not None]
    assert returns
    for value in returns:
        assert isinstance(value, ast.Tuple)
        assert [ast.unparse(element) for element in value.elts] == [RETURNED[name] for name in family.returns]


@every
def test_encode_prompt_takes_what_the_seams_pass(row: str) -> None:
    family, pipeline = ROWS[row]
    parameters = inspect.signature(pipeline.encode_prompt).parameters
    assert {encoder.prompt for encoder in family.encoders} <= parameters.keys()
    both = "negative_embeds" in family.returns
    assert both == ("do_classifier_free_guidance" in parameters)
    assert not both or {f"negative_{encoder.prompt}" for encoder in family.encoders} <= parameters.keys()
    required = {name for name, p in parameters.items() if p.default is p.empty and name != "self"}
    assert required <= {"device", "num_images_per_prompt", "do_classifier_free_guidance", *(encoder.prompt for encoder in family.encoders)}


@every
def test_a_call_checks_its_inputs_first_and_frees_its_models_last(row: str) -> None:
    _, pipeline = ROWS[row]
    order = [name.removeprefix("self.") for name in calls(source(pipeline.__call__))]
    assert order.index("check_inputs") < order.index("encode_prompt") < order.index("maybe_free_model_hooks")
    assert "maybe_free_model_hooks" not in order[: order.index("encode_prompt")]


@every
def test_guidance_runs_as_the_row_says(row: str) -> None:
    family, pipeline = ROWS[row]
    assert family.scale in inspect.signature(pipeline.__call__).parameters
    denoised = {"self.unet", "self.transformer", "current_model"}
    times = sum(name in denoised for name in calls(source(pipeline.__call__)))
    skips_layers = "skip_guidance_layers" in inspect.signature(pipeline.__call__).parameters
    assert times == {"batch": 2 if skips_layers else 1, "sequential": 2}[family.cfg]
    text = inspect.getsource(pipeline.__call__)
    if family.cfg == "batch":  # the negative half comes first
        assert "torch.cat([negative_prompt_embeds, prompt_embeds]" in text
        assert "noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)" in text


@pytest.mark.parametrize("name", NAMES)
def test_denoisers_take_their_arguments_in_the_rows_order(name: str) -> None:
    pipe = FAMILIES[name]()
    family = family_of(pipe)
    for _, denoiser in family.parts(pipe):
        parameters = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        assert tuple(parameters[: len(family.inputs)]) == family.inputs and family.context in parameters
        assert not family.pooled or family.pooled[0] in parameters
        assert set(family.unbatched) <= set(parameters)


@pytest.mark.parametrize("name", NAMES)
def test_the_encoders_are_the_pipelines_text_encoders(name: str) -> None:
    pipe = FAMILIES[name]()
    family = family_of(pipe)
    parts = [part for part in inspect.signature(type(pipe).__init__).parameters if part.startswith("text_encoder")]
    assert [encoder.component for encoder in family.encoders] == parts
    for encoder in family.encoders:
        assert isinstance(getattr(pipe, encoder.component), nn.Module) and getattr(pipe, encoder.tokenizer) is not None
        ends = "t5" in type(getattr(pipe, encoder.component)).__name__.lower()
        assert ends == (encoder.kind == "t5")
    default = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    lengths = {encoder.length for encoder in family.encoders if encoder.kind == "t5"}
    assert lengths == ({default.default} if default is not None else set())


@pytest.mark.parametrize("name", NAMES)
def test_the_text_layers_are_the_only_ones_that_read_the_prompt(name: str) -> None:
    """With them at zero (bias too) no word of the prompt reaches the prediction."""
    pipe = FAMILIES[name]()
    first = latents(pipe, "a dagger", steps=1)
    assert not torch.equal(first, latents(pipe, "a boat", steps=1))
    with torch.no_grad():
        linears = list(family_of(pipe).text_linears(pipe))
        for _, layer, _ in linears:
            layer.weight.zero_()  # type: ignore[operator, union-attr]
    if name == "sdxl":  # its pooled vector joins the time embedding, which cross-attention's closed form leaves alone
        return
    assert torch.equal(latents(pipe, "a dagger", steps=1), latents(pipe, "a boat", steps=1))
    widths = {(reads, layer.in_features) for _, layer, reads in linears}
    assert len(widths) == len({reads for reads, _ in widths})


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_places_are_where_each_encoders_states_are(name: str) -> None:
    pipe = FAMILIES[name]()
    family, prompt = family_of(pipe), "a big red dagger"
    encoded = next(encode(pipe, family, [prompt]))
    seen = torch.zeros_like(encoded.context[0], dtype=torch.bool)
    vectors = [] if encoded.pooled is None else [torch.zeros_like(encoded.pooled[0], dtype=torch.bool)]
    for place, lengths in zip(places(pipe, family, encoded.context.shape[1]), encoded.lengths, strict=True):
        ids = token_ids(pipe, place.encoder, prompt)
        assert len(ids) == int(lengths[0])
        rows, pooled = states(pipe, place.encoder, ids[None])
        if place.tokens is not None and place.channels is not None:
            seen[place.tokens, place.channels] = True
            if place.encoder.kind == "clip" or name == "wan":  # causal or masked: padding does not reach back
                start = place.tokens.start
                torch.testing.assert_close(encoded.context[0, start : start + len(ids), place.channels], rows[0], atol=1e-4, rtol=1e-4)
        if place.pooled is not None:
            assert pooled is not None and encoded.pooled is not None
            vectors[0][place.pooled] = True
            torch.testing.assert_close(encoded.pooled[0, place.pooled], pooled[0], atol=1e-4, rtol=1e-4)
    assert not encoded.context[0][~seen].any(), "whatever no place covers is padding of zeros"
    assert all(vector.all() for vector in vectors)


def test_sd2_is_told_from_sd1_by_its_mark_and_other_pipelines_are_refused() -> None:
    assert [family.name for family in TABLE if "StableDiffusionPipeline" in family.pipelines] == ["sd2", "sd1"]
    with pytest.raises(UnsupportedFamily, match=r"object.*FluxPipeline"):
        family_of(object())


def test_a_second_denoiser_is_edited_where_there_is_one() -> None:
    pipe = FAMILIES["wan"]()
    family: Family = family_of(pipe)
    assert [name for name, _ in family.parts(pipe)] == ["transformer"]
    pipe.transformer_2 = FAMILIES["wan"](seed=1).transformer
    assert [name for name, _ in family.parts(pipe)] == ["transformer", "transformer_2"]
    assert [name.partition(".")[0] for name, _, _ in family.text_linears(pipe)] == ["transformer", "transformer_2"]
