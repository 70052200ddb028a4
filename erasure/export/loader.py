"""A runtime eraser as a folder: the artefact, and a small script that loads it onto its base. There is nothing to fold."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import artifact
from .folding import Notes
from .staging import Partial

SCRIPT = '''"""Load {base!r} with the eraser of ./artefact attached; raises if it would not be erased.

    python load.py "a prompt" --out image.png
    from load import load; pipe = load()
"""

import argparse
from pathlib import Path

import erasure

BASE = {base!r}


def load(base=BASE, **options):
    """An ordinary diffusers pipeline. ``base``: a pipeline, or what erasure.load_base takes, with its ``options``."""
    return erasure.load(Path(__file__).parent / "artefact", base=base, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make an image with the erased model.")
    parser.add_argument("prompt")
    parser.add_argument("--base", default=BASE, help="hub id, diffusers folder or checkpoint; the default is %(default)s")
    parser.add_argument("--out", default="image.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device")
    asked = parser.parse_args()

    import torch

    pipe = load(asked.base, device=asked.device)
    generator = torch.Generator().manual_seed(asked.seed)
    pipe(asked.prompt, num_inference_steps=asked.steps, generator=generator).images[0].save(asked.out)
'''


def write(source: Path, partial: Partial, pipe: Any, config: Mapping[str, Any]) -> Notes:
    """Copy the artefact, check the copy, and write the script; the base is not copied, so that nothing there loads without the eraser."""
    copied = partial.path / "artefact"
    copied.mkdir()
    for name in (*config["files"], artifact.CONFIG):
        shutil.copyfile(source / name, copied / name)
    report = artifact.verify(copied, pipe)
    (partial.path / "load.py").write_text(SCRIPT.format(base=str(config["base"]["id"])))
    usage = """The eraser acts while the pipeline runs, so no plain folder of weights could hold it; erasure-suite has to be installed.

```sh
python THIS_FOLDER/load.py "a prompt" --out image.png
```
"""
    return Notes(usage, {}, {"canary": report["canary"]})
