"""SAFREE filters what each text encoder really reads: second prompts, skipped layers, converted and cleaned words, other pipelines."""

import copy
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from erasure.concept import Concept
from erasure.errors import NotErased
from erasure.families import family_of
from erasure.methods.safree import SAFREE
from tests.methods.safree_reference import LAYOUT, encode, ids_of, reference, vectors
from tests.tiny import FAMILIES, latents, size_of

CONCEPT = Concept("dagger", targets=("dagger", "a big red knife"))
TEXT, OTHER = "a photo of a dagger on the boat", "the night sky with a big cat"


def safe(pipe: Any, text: Any, concept: Concept = CONCEPT, **options: Any) -> dict[str, Tensor]:
    with SAFREE(negative_prompt=False).fit(pipe, [concept]).attach(pipe):
        return encode(pipe, text, **options)


@pytest.mark.parametrize(("family", "second"), [("sdxl", "prompt_2"), ("sd3", "prompt_2"), ("sd3", "prompt_3"), ("flux", "prompt_2")])
@pytest.mark.parametrize("batch", [False, True])
def test_each_encoder_reads_its_own_prompt(family: str, second: str, batch: bool) -> None:
    pipe = FAMILIES[family]()
    texts, seconds = ([OTHER, TEXT], [TEXT, OTHER]) if batch else (OTHER, TEXT)
    ours, of = safe(pipe, texts, CONCEPT, **{second: seconds}), {text: safe(pipe, text) for text in (TEXT, OTHER)}
    for row, (first, other) in enumerate(((OTHER, TEXT), (TEXT, OTHER))[: 2 if batch else 1]):
        for part in LAYOUT[family]:
            expected = of[other if part.encoder.endswith(second[-2:]) else first]
            if part.rows:
                ours_here, expected_here = (each["embeds"][i, part.rows, part.columns] for each, i in ((ours, row), (expected, 0)))
                torch.testing.assert_close(ours_here, expected_here, atol=1e-5, rtol=0)
            if part.pooled:
                torch.testing.assert_close(ours["pooled"][row, part.pooled], expected["pooled"][0, part.pooled], atol=1e-5, rtol=0)


def test_fewer_second_prompts_than_prompts_are_refused() -> None:
    with pytest.raises(NotErased, match="prompt_2"):
        safe(FAMILIES["flux"](), [TEXT, OTHER], prompt_2=TEXT)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3"])
def test_the_layer_that_the_call_asks_for_is_filtered_in_its_own_space(family: str) -> None:
    pipe = FAMILIES[family]()
    for part in LAYOUT[family]:  # a third layer, so that a skip from the second last one does not end at the embeddings
        if isinstance(getattr(pipe, part.encoder), CLIPTextModel | CLIPTextModelWithProjection):
            setattr(pipe, part.encoder, deeper(getattr(pipe, part.encoder)))
    if family == "sd1":  # diffusers 0.42 looks for the last norm where transformers 4 has it
        vars(pipe.text_encoder)["text_model"] = pipe.text_encoder
    expected = reference(pipe, TEXT, CONCEPT.targets, clip_skip=1)
    ours, last = safe(pipe, TEXT, clip_skip=1), safe(pipe, TEXT)
    torch.testing.assert_close(ours["embeds"][0].double(), expected.context, atol=2e-4, rtol=0)
    assert expected.triggers["text_encoder"] and (ours["embeds"] - last["embeds"])[0, :77].abs().max() > 0.1
    if expected.pooled is not None:
        torch.testing.assert_close(ours["pooled"][0].double(), expected.pooled, atol=2e-4, rtol=0)


def deeper(encoder: Any) -> Any:
    config = copy.deepcopy(encoder.config)
    config.num_hidden_layers = 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return type(encoder)(config).eval()


def test_a_word_of_several_learned_vectors_is_filtered_vector_by_vector() -> None:
    pipe = FAMILIES["sd1"]()
    pipe.tokenizer.add_tokens(["<dg>", "<dg>_1"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    table = pipe.text_encoder.get_input_embeddings().weight
    dagger, knife, learned, more = pipe.tokenizer("dagger knife <dg> <dg>_1").input_ids[1:-1]
    with torch.no_grad():
        table[learned], table[more] = table[dagger], table[knife]
    by_hand = pipe.tokenizer("a photo of a <dg> <dg>_1 on the boat").input_ids
    text = "a photo of a <dg> on the boat"
    expected = reference(pipe, text, CONCEPT.targets, ids={"text_encoder": by_hand})
    ours, plain = safe(pipe, text)["embeds"][0], encode(pipe, text)["embeds"][0]
    torch.testing.assert_close(ours.double(), expected.context, atol=2e-4, rtol=0)
    torch.testing.assert_close(ours, safe(pipe, "a photo of a dagger knife on the boat")["embeds"][0], atol=1e-5, rtol=0)
    assert (ours != plain).any()
    learned_phrase = SAFREE().fit(pipe, [Concept("learned", targets=("<dg>",))]).tensors()["text_encoder"]
    named = vectors(pipe, LAYOUT["sd1"][0], ids_of(pipe, LAYOUT["sd1"][0], "dagger knife"))[0]
    torch.testing.assert_close(learned_phrase[0].double(), named, atol=1e-5, rtol=0)


def test_what_the_pipeline_cleans_is_read_cleaned() -> None:
    pipe = FAMILIES["wan"]()
    clean, raw = "a photo <of> a dagger & a boat", "  a photo &lt;of&gt;  a dagger &amp;amp; a boat "
    assert len(ids_of(pipe, LAYOUT["wan"][0], raw)) > len(ids_of(pipe, LAYOUT["wan"][0], clean))
    assert torch.equal(safe(pipe, raw)["embeds"], safe(pipe, clean)["embeds"])
    assert not torch.equal(safe(pipe, clean)["embeds"], encode(pipe, clean)["embeds"])


def test_end_tokens_at_the_end_of_the_text_change_nothing() -> None:
    pipe = FAMILIES["sd1"]()
    for text in (TEXT, "dagger !!!", "!!!"):
        for family in ("sd1", "sdxl"):  # padded by end tokens, and the second of SDXL by "!"
            pipe = FAMILIES[family]()
            expected = reference(pipe, text, CONCEPT.targets)
            torch.testing.assert_close(safe(pipe, text)["embeds"][0].double(), expected.context, atol=2e-4, rtol=0)
    pipe = FAMILIES["sd1"]()
    assert torch.equal(safe(pipe, f"{TEXT} <|endoftext|>")["embeds"], safe(pipe, TEXT)["embeds"])


def test_sd3_runs_without_its_t5() -> None:
    pipe = FAMILIES["sd3"]()
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    expected, ours = reference(pipe, TEXT, CONCEPT.targets), safe(pipe, TEXT)
    torch.testing.assert_close(ours["embeds"][0].double(), expected.context, atol=2e-4, rtol=0)
    assert expected.pooled is not None and not ours["embeds"][0, 77:].any()
    torch.testing.assert_close(ours["pooled"][0].double(), expected.pooled, atol=2e-4, rtol=0)
    base = latents(pipe, TEXT)
    with SAFREE().fit(pipe, [CONCEPT]).attach(pipe):
        assert (latents(pipe, TEXT) - base).norm() > 0.02 * base.norm()


def test_float64_prompts_keep_their_last_bits() -> None:
    pipe = FAMILIES["sdxl"]().to(torch.float64)
    plain, ours = encode(pipe, TEXT)["embeds"][0], safe(pipe, TEXT)["embeds"][0]
    same = (plain == ours).all(-1)
    assert ours.dtype == torch.float64 and same[0] and same[9:].all() and not same.all()


@pytest.mark.parametrize(
    ("family", "kind"),
    [("sd1", StableDiffusionImg2ImgPipeline), ("sdxl", StableDiffusionXLImg2ImgPipeline), ("flux", FluxImg2ImgPipeline)],
)
def test_image_to_image_runs_on_the_safe_prompt(family: str, kind: Any) -> None:
    source = FAMILIES[family]()
    pipe = kind(**source.components)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "strength": 0.5, "output_type": "latent", "image": torch.rand(1, 3, 16, 16)} | size_of(
        source, TEXT
    )
    contexts: list[Tensor] = []

    def run() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe(TEXT, generator=generator, **options).images

    base, ours = run(), safe(source, TEXT)["embeds"][0]
    assert family_of(pipe).name == family
    with SAFREE(self_validating=False).fit(pipe, [CONCEPT]).attach(pipe):
        (_, denoiser), *_ = family_of(pipe).parts(pipe)
        with denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: contexts.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        ):
            erased = run()
    row = 0 if family == "flux" else 1
    positives = contexts[::2] if family == "flux" else contexts
    assert len(positives) == 2 and all(torch.equal(context[row], ours) for context in positives)
    assert (erased - base).norm() > 0.01 * base.norm()
