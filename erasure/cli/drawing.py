"""Who makes the images that a verb needs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ErasureError
from .options import Base

if TYPE_CHECKING:
    from erasure.eval.bench import Bench

    from ..method import Eraser


def draw(
    run: "Bench",
    rows: "Mapping[str, Eraser | None]",
    base: Base,
    artefact: str,
    engine: Literal["local", "ray"],
    shard: tuple[int, int] = (1, 1),
) -> dict[str, Any]:
    """The cells of rows of the table, made as far as the shard goes; none where another rank of the launcher goes on with them."""
    from erasure.eval.engines.ranks import Rank, wait

    rank = Rank.here()
    if engine == "ray":
        from erasure.eval.engines.ray import Recipe, generate

        if rank.count > 1:
            raise ErasureError(f"--engine ray has workers of its own, the launcher started {rank.count} processes: run it without launcher")
        folders = {name: None if eraser is None else artefact for name, eraser in rows.items()}
        return {name: generate(Recipe(run, name, base.arguments(), folders[name]), rows[name], shard) for name in rows}
    cells = {name: run.generate(name, eraser, rank.share(shard)) for name, eraser in rows.items()}
    if not rank.first:
        return {}
    for cell in cells.values():
        wait(cell, shard)
    return cells
