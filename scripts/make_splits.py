"""Write erasure/canvas/splits.yaml from the rule in erasure.canvas.splits.choose."""

from pathlib import Path

import yaml

from erasure.canvas.splits import choose
from erasure.canvas.world import world

HEADER = "# Made by scripts/make_splits.py from hashes of the names; a test holds this file against the rule.\n"

if __name__ == "__main__":
    path = Path(__file__).parents[1] / "erasure/canvas/splits.yaml"
    path.write_text(HEADER + yaml.safe_dump(choose(world()), sort_keys=False, default_flow_style=None, width=130))
    print(f"wrote {path.name}")
