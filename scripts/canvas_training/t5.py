"""The tiny T5 of the flow canvas: a Unigram tokenizer and a bidirectional encoder, pre-trained to name what a caption asks for."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from erasure.canvas.world import World

from .loop import log, train
from .scenes import sample
from .text import LENGTH, WIDTH, accuracy, captions, corpus, sizes, tokenize

SPECIAL = ("<pad>", "</s>", "<unk>")


def build_tokenizer(world: World, size: int = 1200) -> T5TokenizerFast:
    """T5's own layout: padding 0, end 1, unknown 2, then pieces of words that begin with a low line."""
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False)
    words = corpus(world)
    learner.train_from_iterator([*words, *(word.capitalize() for word in words[::4])], trainer)
    pieces = [(piece, score) for piece, score in json.loads(learner.to_str())["model"]["vocab"]]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def build_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=WIDTH // 5,
            d_ff=3 * WIDTH,
            num_layers=3,
            num_heads=5,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


class Namer(nn.Module):
    """The encoder with four linear heads on the mean of its tokens, which are thrown away after the pre-training."""

    def __init__(self, encoder: T5EncoderModel, world: World) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(WIDTH, size) for size in sizes(world))

    def forward(self, ids: Tensor) -> list[Tensor]:
        mean = self.encoder(ids).last_hidden_state.mean(1)  # padding included: FLUX's transformer reads it too
        return [head(mean) for head in self.heads]


def fit(folder: Path, world: World, seconds: float, batch: int = 128) -> tuple[T5TokenizerFast, T5EncoderModel]:
    tokenizer = build_tokenizer(world)
    encoder = build_encoder(tokenizer)
    namer = Namer(encoder, world)
    everything = torch.ones(len(world.objects), len(world.styles), dtype=torch.bool)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        texts, labels = captions(world, sample(batch, everything, generator, pair_share=0.4), generator, noise=0.5)
        texts = [text.capitalize() if i % 8 == 0 else text for i, text in enumerate(texts)]
        with torch.autocast("cpu", torch.bfloat16):
            logits = namer(tokenize(tokenizer, texts))
        return sum(F.cross_entropy(head.float(), labels[:, k]) for k, head in enumerate(logits))  # type: ignore[return-value]

    train("t5", namer, loss_of, folder=folder, steps=10**6, seconds=seconds, lr=2e-3, weight_decay=0.01, ema=0.98, save_every=500)
    log.info("t5: %s", {split: [round(x, 3) for x in accuracy(world, tokenizer, namer, split)] for split in ("fit", "dev", "test")})
    tokenizer.save_pretrained(folder / "tokenizer_2")
    encoder.save_pretrained(folder / "text_encoder_2")
    return tokenizer, encoder
