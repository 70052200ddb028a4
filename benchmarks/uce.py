"""UCE at the size of SD 1.5, random weights: seconds and memory for 1, 10, 100 and 1,000 concepts erased in one closed form.

    python benchmarks/uce.py                  # all four, each in a process of its own; some minutes on two cores
    python benchmarks/uce.py --counts 1 10

Weights decide nothing about cost, so they are random. Each concept is one phrase (``expand=False``; the five templates of the default take
five times as many encodings); 40 words are retained in all runs.
Writes docs/benchmarks/uce.json and prints the table of docs/performance.md.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[1] / "docs/benchmarks/uce.json"
COUNTS = (1, 10, 100, 1000)
RETAINED = 40


def pipeline() -> Any:
    """Text encoder and UNet of SD 1.5, from their configurations alone."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from erasure.testing.tiny import SCHEDULE, tokenizer

    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(),
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=words,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def names(n: int) -> list[str]:
    """Distinct words of four letters."""
    return ["".join(letters) for letters in itertools.islice(itertools.product("abcdefghij", repeat=4), n)]


def measure(n: int) -> dict[str, Any]:
    """One fit of ``n`` concepts in this process."""
    import torch

    from erasure import Concept, Run
    from erasure.methods.uce import UCE

    pipe = pipeline()
    *concepts, _ = (Concept(name) for name in names(n + 1))
    retained = tuple(reversed(names(9999)))[:RETAINED]
    concepts[0] = Concept(concepts[0].name, retain=retained)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    eraser = UCE(expand=False).fit(pipe, concepts, run=Run(progress=False))
    seconds = time.perf_counter() - started
    changed = eraser.tensors()
    assert len(changed) == 32 and all(tensor.isfinite().all() for tensor in changed.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "concepts": n,
        "seconds": round(seconds, 1),
        "peak_mb": round(peak),
        "above_the_model_mb": round(peak - before),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one)))
        return
    rows = []
    for n in arguments.counts:
        done = subprocess.run([sys.executable, __file__, "--one", str(n)], check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr)
    arguments.out.write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=1) + "\n")
    print("| concepts | seconds | peak MB | above the model MB |\n|---:|---:|---:|---:|")
    for row in rows:
        print(f"| {row['concepts']:,} | {row['seconds']} | {row['peak_mb']:,} | {row['above_the_model_mb']:,} |")


if __name__ == "__main__":
    main()
