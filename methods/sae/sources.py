"""Which coders a method works with: those of a folder, or those that ship with the embedded model."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError
from erasure.families import Family

from .coder import SparseCoder
from .formats import is_coder, load
from .hookpoints import find

SHIPPED = ("erasure.canvas", "weights/sae")


def coders(pipe: Any, family: Family, folder: str) -> list[SparseCoder]:
    """Coders on the pipeline's device: of a folder, of its folders, or, if it is "", those that ship for the canvases.

    Of the latter, those of components that the pipeline has. A coder whose hookpoint the pipeline lacks, or has in another width, raises.
    """
    root = Path(folder) if folder else Path(str(files(SHIPPED[0]).joinpath(SHIPPED[1])))
    homes = [root] if is_coder(root) else sorted(home for home in root.glob("*") if is_coder(home))
    if not folder:
        homes = [home for home in homes if getattr(pipe, home.name, None) is not None]
    if not homes:
        raise ErasureError(
            f"no sparse coder in {folder!r}: give --sae a folder that `erasure sae train` wrote"
            if folder
            else "the canvas's coder is not installed"
        )
    found = [load(home) for home in homes]
    for home, coder in zip(homes, found, strict=True):
        try:
            encoder, _ = find(pipe, family, coder.config.hookpoint)
        except ErasureError as error:
            hint = (
                ""
                if folder
                else "; the coder that ships is the canvas's: train one for this model with `erasure sae train`, and give it as sae"
            )
            raise ErasureError(f"{home.name if folder else 'no coder is given, and'}: {error}{hint}") from error
        width = int(getattr(pipe, encoder.component).config.hidden_size)
        if width != coder.config.d_in:
            hint = "" if folder else ": the coder that ships is the canvas's; train one for this model with `erasure sae train`"
            raise ErasureError(f"{coder.config.hookpoint} is {width} wide, and the coder was made for {coder.config.d_in}{hint}")
        coder.to(pipe._execution_device)
    return found
