"""The CLIP text encoder and its byte-level BPE tokenizer, pre-trained to name what a caption asks for."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from erasure.canvas.world import World, fill

from .loop import log, train
from .scenes import FILLERS, Scenes, caption, sample

LENGTH, WIDTH = 32, 160


def corpus(world: World) -> list[str]:
    """Every word that a prompt of the canvas can hold, object words more often than fillers."""
    words: list[str] = list(FILLERS) + list(world.categories) + list(world.backgrounds) * 4
    for name in (*world.objects, *world.styles):
        words += [name, *world.synonyms(name)] * 4
    for split in ("fit", "dev", "test"):
        words += [fill(t, "a", "ink", "sky") for t in world.templates(split)] * 2
    words += [p.format(x="", y="") for split in ("fit", "test") for p in world.pair_templates(split)]
    return words


def build_tokenizer(world: World, merges: int = 900) -> CLIPTokenizer:
    """CLIP's own layout: 256 bytes ("!" is 0), 256 bytes that end a word, merges, then the two special tokens."""
    alphabet = _clip_alphabet()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=512 + merges, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False, min_frequency=2
    )
    learner.train_from_iterator([w.lower() for w in corpus(world)], trainer)

    learned = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in learned)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=learned, model_max_length=LENGTH)


def _clip_alphabet() -> list[str]:
    """The 256 byte characters in CLIP's order: printable ones first, so that "!" has id 0."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def build_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=5,
            max_position_embeddings=LENGTH,
            projection_dim=WIDTH,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def captions(world: World, scenes: Scenes, generator: torch.Generator, noise: float) -> tuple[list[str], Tensor]:
    """Captions of scenes, and the labels [n, 4] that they name: first and second object (or category), style, background."""
    texts, labels = [], torch.empty(len(scenes), 4, dtype=torch.long)
    for i in range(len(scenes)):
        pair = scenes.objects[i].tolist()
        text, exact, styled, placed = caption(world, pair, int(scenes.styles[i]), int(scenes.backgrounds[i]), generator, noise)
        texts.append(text)
        category = len(world.objects) + list(world.categories).index(world.category_of(world.objects[pair[0]]))
        labels[i, 0] = pair[0] if exact else category
        labels[i, 1] = pair[1] if pair[1] >= 0 else len(world.objects)
        labels[i, 2] = scenes.styles[i] if styled else len(world.styles)
        labels[i, 3] = scenes.backgrounds[i] if placed else len(world.backgrounds)
    return texts, labels


def tokenize(tokenizer: Any, texts: list[str], padding: str = "max_length") -> Tensor:
    return tokenizer(texts, padding=padding, truncation=True, max_length=LENGTH, return_tensors="pt").input_ids


def sizes(world: World) -> tuple[int, int, int, int]:
    """Number of answers to each of the four questions: first object or category, second object, style, background; or none."""
    return len(world.objects) + len(world.categories), len(world.objects) + 1, len(world.styles) + 1, len(world.backgrounds) + 1


class Namer(nn.Module):
    """The encoder with four linear heads on its pooled output, which are thrown away after the pre-training."""

    def __init__(self, encoder: CLIPTextModel, world: World) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(WIDTH, size) for size in sizes(world))

    def forward(self, ids: Tensor) -> list[Tensor]:
        pooled = self.encoder(ids).pooler_output
        return [head(pooled) for head in self.heads]


def fit(folder: Path, world: World, seconds: float, batch: int = 128) -> tuple[CLIPTokenizer, CLIPTextModel]:
    tokenizer = build_tokenizer(world)
    encoder = build_encoder(tokenizer)
    namer = Namer(encoder, world)
    everything = torch.ones(len(world.objects), len(world.styles), dtype=torch.bool)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        texts, labels = captions(world, sample(batch, everything, generator, pair_share=0.4), generator, noise=0.5)
        with torch.autocast("cpu", torch.bfloat16):  # attention is causal, so padding after the pooled token changes nothing
            logits = namer(tokenize(tokenizer, texts, "longest"))
        return sum(F.cross_entropy(head.float(), labels[:, k]) for k, head in enumerate(logits))  # type: ignore[return-value]

    train("text", namer, loss_of, folder=folder, steps=10**6, seconds=seconds, lr=2e-3, weight_decay=0.01, ema=0.98, save_every=10**6)
    log.info("text: %s", {split: [round(x, 3) for x in accuracy(world, tokenizer, namer, split)] for split in ("fit", "dev", "test")})
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "text_encoder")
    return tokenizer, encoder


@torch.no_grad()
def accuracy(world: World, tokenizer: Any, namer: nn.Module, split: str, n: int = 512) -> list[float]:
    """Share of prompts of a template split whose first object, second object, style and background are named."""
    generator = torch.Generator().manual_seed(7)
    scenes = sample(n, torch.ones(len(world.objects), len(world.styles), dtype=torch.bool), generator, pair_share=0.4)
    templates, joins = world.templates(split), world.pair_templates("test" if split == "test" else "fit")
    texts = []
    for i in range(n):
        names = [world.objects[o] for o in scenes.objects[i].tolist() if o >= 0]
        noun = world.noun(*names, pair=joins[i % len(joins)])
        style, background = world.styles[scenes.styles[i]], world.backgrounds[scenes.backgrounds[i]]
        texts.append(fill(templates[i % len(templates)], noun, style, background))
    wanted = [
        scenes.objects[:, 0],
        torch.where(scenes.objects[:, 1] < 0, len(world.objects), scenes.objects[:, 1]),
        scenes.styles,
        scenes.backgrounds,
    ]
    logits = namer(tokenize(tokenizer, texts))
    return [(logits[k].argmax(1) == wanted[k]).float().mean().item() for k in range(4)]
