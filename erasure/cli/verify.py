"""``erasure verify``: does an artefact still do what it did?"""

import json as jsonlib
from pathlib import Path

from .options import Base, Component, Json


def verify(artefact: Path, base: Base, *, component: Component = None, json: Json = False) -> None:
    """Check an artefact on its base: schema, hashes, fingerprint, changed tensors and canary.

    Exit code 1 at the first check that fails, 2 for a folder that is no artefact or for another base.

    Parameters
    ----------
    artefact: Folder that `erasure erase` wrote.
    """
    from .. import artifact

    artifact.load_eraser(artefact, component)  # said before a large base is loaded
    report = artifact.verify(artefact, base.load(), component=component)
    if json:
        print(jsonlib.dumps(report, indent=2))
        return
    print("\n".join(f"{key}: {value}" for key, value in report.items()))
    print(f"ok: it loads onto this base and erases {'as recorded' if component is None else 'there'}")
