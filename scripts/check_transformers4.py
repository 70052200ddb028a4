"""Load in transformers 4 what `erasure export` wrote with transformers 5, and compare the text encoders' outputs.

    python scripts/check_transformers4.py [--folder DIR] [--version '>=4.48,<5']

transformers 4 goes into a folder of its own (kept in --folder for the next run) that a child process has first on its path; torch is the
one that is here. Exit code 0: equal. As a control, the file that transformers 5 writes by itself must fail.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

CHILD = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file

torch.set_num_threads(1)
root = Path(sys.argv[1])
report = {"transformers": transformers.__version__}
for name in ("CLIPTextModel", "CLIPTextModelWithProjection", "control"):
    cls = getattr(transformers, name, transformers.CLIPTextModel)
    model, info = cls.from_pretrained(root / name, output_loading_info=True)
    wanted = load_file(root / f"{name}.outputs")
    with torch.no_grad():
        output = model.eval()(wanted["ids"], output_hidden_states=True)
    made = {"hidden": output.hidden_states[-2], "last": output.last_hidden_state, "pooled": output[0 if "Projection" in name else 1]}
    report[name] = {
        "missing": sorted(key for key in info["missing_keys"] if "position_ids" not in key),
        "unexpected": sorted(info["unexpected_keys"]),
        "difference": max(float((made[key] - wanted[key]).abs().max()) for key in made),
    }
tokenizer = transformers.CLIPTokenizer.from_pretrained(root / "tokenizer")
report["tokens"] = tokenizer(json.loads((root / "prompts.json").read_text()), padding="max_length", truncation=True).input_ids
print(json.dumps(report))
"""
PROMPTS = ["a dagger", "Two daggers on a red sofa, watercolour!", ""]
TOLERANCE = 1e-5


def prepare(root: Path) -> list[list[int]]:
    """Export the canvas, make an encoder with projection beside it, and note what each gives here; gives the tokens of the prompts."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    import erasure
    from erasure import artifact
    from erasure.canvas.concepts import canvas_concept
    from erasure.export import export
    from erasure.export.full import prefix_encoder
    from erasure.registry import methods

    pipe = erasure.load_base("canvas", device="cpu")
    eraser = methods.get("uce")().fit(pipe, [canvas_concept("dagger")])
    artifact.save(eraser, root / "artefact", pipe=pipe, base_id="canvas")
    export(root / "artefact", pipe, root / "full", "full")
    (root / "full/text_encoder").rename(root / "CLIPTextModel")
    (root / "full/tokenizer").rename(root / "tokenizer")
    (root / "tokenizer/tokenizer.json").unlink()  # transformers 4's own files alone
    torch.manual_seed(0)
    config = CLIPTextConfig(**{**pipe.text_encoder.config.to_dict(), "projection_dim": 48})
    projecting = CLIPTextModelWithProjection(config).eval()
    projecting.save_pretrained(root / "CLIPTextModelWithProjection")
    prefix_encoder(root / "CLIPTextModelWithProjection/model.safetensors")
    fresh = CLIPTextModel(pipe.text_encoder.config)  # one that was loaded is written as its file was
    fresh.load_state_dict(pipe.text_encoder.state_dict())
    fresh.save_pretrained(root / "control")
    batch = pipe.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    encoders = {"CLIPTextModel": pipe.text_encoder, "control": pipe.text_encoder, "CLIPTextModelWithProjection": projecting}
    for name, encoder in encoders.items():
        with torch.no_grad():
            output = encoder(batch, output_hidden_states=True)
        pooled = output.text_embeds if encoder is projecting else output.pooler_output
        tensors = {"ids": batch, "hidden": output.hidden_states[-2], "last": output.last_hidden_state, "pooled": pooled}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, root / f"{name}.outputs")
    return [list(map(int, row)) for row in batch]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where transformers 4 is, or is to be, installed")
    parser.add_argument("--version", default=">=4.48,<5")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        overlay = asked.folder or Path(scratch, "transformers4")
        if not (overlay / "transformers").is_dir():
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--target", str(overlay)]
            subprocess.run([*pip, f"transformers{asked.version}"], check=True)
        tokens = prepare(Path(scratch))
        Path(scratch, "prompts.json").write_text(json.dumps(PROMPTS))
        path = os.pathsep.join([str(overlay), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", CHILD, scratch], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return 1
    report = json.loads(done.stdout.splitlines()[-1])
    ours, control = [report["CLIPTextModel"], report["CLIPTextModelWithProjection"]], report["control"]
    sound = all(not part["missing"] and not part["unexpected"] and part["difference"] < TOLERANCE for part in ours)
    control_fails = bool(control["missing"]) and control["difference"] > TOLERANCE
    print(f"transformers {report['transformers']}; largest differences {[part['difference'] for part in ours]}")
    print(f"control, as transformers 5 writes it: {len(control['missing'])} keys missing, difference {control['difference']:.3g}")
    print(f"tokens equal: {report['tokens'] == tokens}")
    ok = sound and report["tokens"] == tokens and report["transformers"].startswith("4.") and control_fails
    print("ok" if ok else f"FAILED: {json.dumps({key: report[key] for key in ('CLIPTextModel', 'CLIPTextModelWithProjection')})}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
