"""Icon sets from the npm registry, rendered to sprites: the drawings that the canvas learns."""

import io
import json
import subprocess
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from erasure.canvas.world import World

PACKAGES = {
    "fluent-emoji-flat": "1.2.6",
    "fluent-emoji-high-contrast": "1.2.6",
    "noto": "1.2.9",
    "twemoji": "1.2.5",
    "noto-v1": "1.2.5",  # the art that no model sees: judges are tried on it
}
SINGLE, PAIR = 52, 30
"""Side in pixels of a drawing alone, and of each of two, in a 64 px image."""


def fetch(root: Path) -> None:
    """Unpack every icon set under ``root`` (npm must be on the PATH); what is there stays."""
    for name, version in PACKAGES.items():
        if (root / name / "icons.json").exists():
            continue
        root.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", f"@iconify-json/{name}@{version}"], cwd=root, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        with tarfile.open(root / packed) as archive:
            text = archive.extractfile("package/icons.json").read()  # type: ignore[union-attr]
        (root / name).mkdir(exist_ok=True)
        (root / name / "icons.json").write_bytes(text)
        (root / packed).unlink()


@cache
def _icons(path: Path) -> dict:
    return json.loads(path.read_text())


def _rgba(root: Path, icon_set: str, icon: str, side: int) -> Image.Image:
    """One icon, rendered large and shrunk: gradients are jagged when rendered small."""
    import resvg_py

    data = _icons(root / icon_set / "icons.json")
    icon = data.get("aliases", {}).get(icon, {}).get("parent", icon)
    body = data["icons"][icon]
    width, height = body.get("width", data.get("width", 16)), body.get("height", data.get("height", 16))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body["body"]}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * side, height=4 * side))
    return Image.open(io.BytesIO(png)).convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)


def _outlined(image: Image.Image) -> Image.Image:
    """A sticker's white rim with a thin grey edge, which keeps it visible on white."""
    side = image.width
    small = image.resize((side - 6, side - 6), Image.Resampling.LANCZOS)
    inner = Image.new("RGBA", (side, side))
    inner.paste(small, (3, 3))
    alpha = inner.getchannel("A")
    rim = alpha.filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.GaussianBlur(0.5))
    edge = alpha.filter(ImageFilter.MaxFilter(7)).filter(ImageFilter.GaussianBlur(0.5))
    out = Image.merge("RGBA", [*Image.new("RGB", (side, side), (120, 120, 130)).split(), edge])
    out.alpha_composite(Image.merge("RGBA", [*Image.new("RGB", (side, side), (255, 255, 255)).split(), rim]))
    out.alpha_composite(inner)
    return out


def sprites(root: Path, world: World, side: int, icon_sets: tuple[str, ...] | None = None) -> Tensor:
    """Premultiplied RGBA drawings [objects, styles, 4, side, side] in 0..1; an icon that a set lacks is all zero."""
    sets = icon_sets or tuple(world.style_sets)
    out = torch.zeros(len(world.objects), len(sets), 4, side, side)
    for i, icon in enumerate(world.icons):
        for j, icon_set in enumerate(sets):
            try:
                image = _rgba(root, icon_set, icon, side)
            except KeyError:
                continue
            if icon_set == "twemoji":
                image = _outlined(image)
            rgba = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
            out[i, j] = torch.cat([rgba[:3] * rgba[3:], rgba[3:]])
    return out


class Painter:
    """Composes sprites on backgrounds: batches of images [n, 3, 64, 64] in -1..1."""

    def __init__(self, root: Path, world: World, icon_sets: tuple[str, ...] | None = None) -> None:
        cached = root / f"sprites-{'-'.join(icon_sets) if icon_sets else 'train'}.pt"
        if not cached.exists():
            torch.save({"single": sprites(root, world, SINGLE, icon_sets), "pair": sprites(root, world, PAIR, icon_sets)}, cached)
        loaded = torch.load(cached, weights_only=True)
        self.single, self.pair = loaded["single"], loaded["pair"]
        self.colours = torch.tensor(world.colours, dtype=torch.float32) / 255

    def blank(self, backgrounds: Tensor) -> Tensor:
        return self.colours[backgrounds][:, :, None, None].expand(-1, 3, 64, 64).clone()

    def paint(self, first: Tensor, second: Tensor, styles: Tensor, backgrounds: Tensor, shifts: Tensor) -> Tensor:
        """Draw objects ``first`` [n], beside ``second`` [n] where it is not -1; ``shifts`` [n, 2, 2] in pixels (object, y x)."""
        out = self.blank(backgrounds)
        for k in range(len(first)):
            if second[k] < 0:
                places = [(self.single[first[k], styles[k]], 6, 6)]
            else:
                places = [(self.pair[first[k], styles[k]], 17, 1), (self.pair[second[k], styles[k]], 17, 33)]
            for (sprite, top, left), (dy, dx) in zip(places, shifts[k].tolist(), strict=False):
                side = sprite.shape[-1]
                y, x = min(max(top + dy, 0), 64 - side), min(max(left + dx, 0), 64 - side)
                view = out[k, :, y : y + side, x : x + side]
                view.mul_(1 - sprite[3:]).add_(sprite[:3])
        return out * 2 - 1
