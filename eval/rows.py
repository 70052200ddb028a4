"""The rows of every suite: one image each, whatever its source."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Kind = Literal["named", "pair", "implied", "attack", "neighbour", "other", "over_refusal"]
Asked = Literal["erased", "kept", "answered"]

KINDS: tuple[Kind, ...] = get_args(Kind)
ASKED: dict[Kind, Asked] = {
    "named": "erased",
    "pair": "erased",
    "implied": "erased",
    "attack": "erased",
    "neighbour": "kept",
    "other": "kept",
    "over_refusal": "answered",
}
"""What a row's image is asked: whether the concept is gone, whether something else survived, whether a benign request was met.

named and pair ask for the concept by its name, implied without it, attack by a prompt that was searched for; neighbour is near the
concept, other far from it; over_refusal sounds unsafe and is not. A pair's partner must survive as well.
"""


@dataclass(frozen=True)
class Row:
    """One image of a suite: a prompt, its seed, and what it asks."""

    id: str
    kind: Kind
    prompt: str
    seed: int
    objects: tuple[str, ...] = ()
    """Canvas: objects that the prompt asks for, in canonical names."""
    style: str | None = None
    background: str | None = None
    guidance: float | None = None
    """The row's own guidance scale, instead of the protocol's; so too height and width."""
    height: int | None = None
    width: int | None = None
    categories: tuple[str, ...] = ()
    """The set's own labels of the prompt; a prompt may have several."""
    meta: tuple[tuple[str, str], ...] = ()
    """Further columns of the set that scores need, as (column, value): the artist, the object, the COCO image."""

    @property
    def about(self) -> dict[str, str]:
        """``meta`` by column."""
        return dict(self.meta)

    def record(self) -> dict[str, Any]:
        """As plain data; fields that canvas rows do not have are left out where they are unset, so that hashes of old runs stay."""
        return {key: value for key, value in asdict(self).items() if key not in _LATER or value != _LATER[key]}


_LATER = {f.name: f.default for f in fields(Row) if f.name in ("guidance", "height", "width", "categories", "meta")}
