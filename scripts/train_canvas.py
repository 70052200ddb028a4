"""Rebuild the canvas and its judges from icon sets: one command, stage by stage, resumable after a kill.

    python scripts/train_canvas.py                  # everything: about two and a half hours on two free cores
    python scripts/train_canvas.py --budget 0.02    # the same chain in minutes, to see that it runs
    python scripts/train_canvas.py --control        # the retrained control (no test concepts), on the parts made before
    python scripts/train_canvas.py --flow           # canvas-flow, on the autoencoder and CLIP text encoder made before

Stages that are done are skipped; a stage that was killed goes on from its last checkpoint. Progress goes to the terminal and to
``train.log`` in the build folder. Needs the extra ``canvas-train`` and npm on the PATH.
"""

import argparse
import json
import logging
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline, FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from canvas_training import art, flow, judges, t5, text, unet, vae
from erasure.canvas.splits import splits, training_drawings
from erasure.canvas.world import world

SECONDS = {"vae": 660, "text": 150, "unet": 5100, "control": 2400, "t5": 150, "flow": 4500}
JUDGE_STEPS = {"judge_dev": 2400, "judge_test": 2000}
WEIGHTS = Path(__file__).parents[1] / "erasure/canvas/weights"
log = logging.getLogger("canvas")


class Build:
    """The parts of one build folder, made when first asked for."""

    def __init__(self, folder: Path, budget: float) -> None:
        self.folder, self.budget, self.world = folder, budget, world()
        art.fetch(folder / "icons")
        self.painter = art.Painter(folder / "icons", self.world)
        self.drawings = training_drawings(self.world)

    def done(self, part: str) -> bool:
        return (self.folder / part).exists()

    def vae(self) -> AutoencoderKL:
        if not self.done("vae"):
            vae.fit(self.folder, self.painter, self.drawings, SECONDS["vae"] * self.budget)
        return AutoencoderKL.from_pretrained(self.folder / "vae").eval()

    def text(self) -> tuple[CLIPTokenizer, CLIPTextModel]:
        if not self.done("text_encoder"):
            text.fit(self.folder, self.world, SECONDS["text"] * self.budget)
        return CLIPTokenizer.from_pretrained(self.folder / "tokenizer"), CLIPTextModel.from_pretrained(self.folder / "text_encoder").eval()

    def unet(self, name: str = "unet") -> UNet2DConditionModel:
        """The denoiser, or the ``control``: the same recipe without the test concepts, on the shared autoencoder and text encoder.

        Sharing is sound: neither decides what is drawn. The encoder knows the words, the control has never seen them drawn.
        """
        if not self.done(name):
            drawings = training_drawings(self.world, without=splits().test if name == "control" else ())
            seconds = SECONDS[name] * self.budget
            unet.fit(self.folder, self.world, self.painter, drawings, self.vae(), *self.text(), name=name, seconds=seconds)
        return UNet2DConditionModel.from_pretrained(self.folder / name)

    def t5(self) -> tuple[T5TokenizerFast, T5EncoderModel]:
        if not self.done("text_encoder_2"):
            t5.fit(self.folder, self.world, SECONDS["t5"] * self.budget)
        return T5TokenizerFast.from_pretrained(self.folder / "tokenizer_2"), T5EncoderModel.from_pretrained(
            self.folder / "text_encoder_2"
        ).eval()

    def flow(self) -> FluxPipeline:
        texts, t5s, autoencoder = self.text(), self.t5(), self.vae()
        if not self.done("flow"):
            flow.fit(self.folder, self.world, self.painter, self.drawings, autoencoder, texts, t5s, seconds=SECONDS["flow"] * self.budget)
        transformer = FluxTransformer2DModel.from_pretrained(self.folder / "flow").eval()
        return flow.pipeline(autoencoder, texts[1], texts[0], t5s[1], t5s[0], transformer)

    def judge(self, name: str) -> None:
        if not self.done(f"{name}.safetensors"):
            judges.fit(self.folder, self.world, self.painter, self.vae(), name, round(JUDGE_STEPS[name] * self.budget))

    def pipeline(self, denoiser: str = "unet") -> StableDiffusionPipeline:
        tokenizer, encoder = self.text()
        return unet.pipeline(self.vae(), encoder, tokenizer, self.unet(denoiser))


def package(pipe: DiffusionPipeline, target: Path) -> None:
    """Write fp16 weights where the package ships them, under the names that transformers 4 and 5 both read."""
    shutil.rmtree(target, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(target)
    prefix_text_encoder(target / "text_encoder/model.safetensors")
    write_vocabulary(target / "tokenizer")
    for path in target.rglob("config.json"):  # where the parts came from is nobody's business
        config = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    index = target / "model_index.json"  # the names that transformers 4 has too
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    log.info("packaged %.1f MB in %s", size / 1e6, target.name)


def prefix_text_encoder(path: Path) -> None:
    """transformers 5 writes CLIP text encoders without ``text_model.``; transformers 4 would then load random weights."""
    tensors = load_file(path)
    named = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in tensors.items()}
    save_file(named, path, metadata={"format": "pt"})


def write_vocabulary(folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json: transformers 4 reads those."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("canvas-build"), help="build folder")
    parser.add_argument("--budget", type=float, default=1.0, help="share of the full training time")
    parser.add_argument("--control", action="store_true", help="train the retrained control instead, into FOLDER/control-pipeline")
    parser.add_argument("--package", type=Path, default=WEIGHTS, help="folder that gets the packaged weights")
    parser.add_argument("--flow", action="store_true", help="train and package canvas-flow instead")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(arguments.folder / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.manual_seed(0)
    build = Build(arguments.folder, arguments.budget)
    if arguments.control:
        build.pipeline("control").save_pretrained(arguments.folder / "control-pipeline")
        return
    if arguments.flow:
        package(build.flow(), arguments.package / "canvas-flow")
        return
    for name in judges.BUILDERS:
        build.judge(name)
        shutil.copy(arguments.folder / f"{name}.safetensors", arguments.package / f"{name}.safetensors")
    package(build.pipeline(), arguments.package / "canvas")


if __name__ == "__main__":
    main()
