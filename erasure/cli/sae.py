"""``erasure sae``: train sparse coders of text encoders, look into them, and use them as detectors."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from .examples import epilogue
from .options import Base, Folder, Json, Positive, emit
from .output import chatty

app = App(
    name="sae",
    help="Train sparse autoencoders of text encoders, look into them, and detect concepts by them.",
    help_format="plaintext",
    help_epilogue=epilogue("sae"),
)
CANVAS = "canvas"


def train(
    base: Base,
    *,
    hookpoint: Annotated[
        str, Parameter(help="The layer whose output is coded: text_encoder.layers.8, or unet.up_blocks.1.attentions.1 for saeuron.")
    ],
    out: Annotated[Folder, Parameter(help="Folder of the coder; a killed training goes on from its checkpoint there.")],
    prompts: Annotated[
        str, Parameter(help="File of prompts (.txt, .csv, .tsv, .json, .jsonl, .parquet), or a suite; the canvas has captions of its own.")
    ] = CANVAS,
    latents: Annotated[Positive, Parameter(help="Number of latents.")] = 2048,
    k: Annotated[Positive, Parameter(help="Latents that may be on at once.")] = 16,
    activation: Annotated[Literal["topk", "abstopk", "relu"], Parameter(help="What keeps the codes sparse.")] = "topk",
    steps: Annotated[Positive, Parameter(help="Optimiser steps.")] = 800,
    batch: Annotated[Positive, Parameter(help="Prompts a step, with all their tokens; of a UNet, as many maps.")] = 64,
    lr: Annotated[float, Parameter(help="Learning rate.")] = 1e-3,
    seed: Annotated[int, Parameter(help="Seed.")] = 0,
    half: Annotated[bool, Parameter(help="Write float16.", negative=())] = False,
    json: Json = False,
) -> None:
    """Train a sparse coder on a text encoder's activations."""
    import torch

    from erasure.methods.sae.coder import SparseCoderConfig
    from erasure.methods.sae.training import fit, reader
    from erasure.methods.saeuron.training import reader as unet_reader

    pipe = base.load()
    texts = texts_of(prompts)
    read, width = (unet_reader if hookpoint.startswith("unet.") else reader)(pipe, hookpoint, texts, batch)
    config = SparseCoderConfig(d_in=width, num_latents=latents, k=k, activation=activation, hookpoint=hookpoint)
    settings = {"model": base.model, "hookpoint": hookpoint, "prompts": len(texts), "latents": latents, "k": k, "activation": activation}
    coder, measured = fit(
        read,
        config,
        steps=steps,
        lr=lr,
        seed=seed,
        device=pipe._execution_device,
        checkpoint=out,
        settings=settings,
        progress=chatty(json),
    )
    coder.save(out, torch.float16 if half else torch.float32)
    record = {"sae": str(out), "hookpoint": hookpoint, "prompts": len(texts), **{name: round(value, 4) for name, value in measured.items()}}
    emit([record], json, tuple(record))


def texts_of(source: str) -> list[str]:
    """Prompts of a file, of a suite, or of the canvas; none at all raises."""
    from erasure.errors import ErasureError
    from erasure.eval.readers import read_records

    if source == CANVAS:
        from erasure.canvas.captions import captions

        return captions()
    if Path(source).exists():
        texts = [text for record in read_records(source, Path(source).read_bytes()) if (text := record.get("prompt", ""))]
    else:
        from erasure.eval.suite import load_suite

        suite = load_suite(source)
        texts = [row.prompt for row in suite.rows(suite.default_concept())]
    if not texts:
        raise ErasureError(f"{source} holds no prompts: a text file has one a line, a table a column named prompt")
    return list(dict.fromkeys(texts))


app.command(train, help_epilogue=epilogue("sae train"))
app.command(
    "erasure.cli.sae_inspect:inspect",
    name="inspect",
    help="Show a concept's features, on the terminal and as a page.",
    help_epilogue=epilogue("sae inspect"),
)
app.command(
    "erasure.cli.sae_detect:detect",
    name="detect",
    help="Which prompts have a concept, by the gate of itd.",
    help_epilogue=epilogue("sae detect"),
)
