"""``erasure verify``: does an artefact still do what it did?"""

import json as jsonlib
from pathlib import Path

from .options import Base, Json


def verify(artefact: Path, base: Base, *, json: Json = False) -> None:
    """Check an artefact on its base: schema, hashes, fingerprint, changed tensors and canary.

    Exit code 1 at the first check that fails, 2 for a folder that is no artefact or for another base.

    Parameters
    ----------
    artefact: Folder that `erasure erase` wrote.
    """
    from .. import artifact

    artifact.load_eraser(artefact)  # said before a large base is loaded
    report = artifact.verify(artefact, base.load())
    if json:
        print(jsonlib.dumps(report, indent=2))
        return
    print("\n".join(f"{key}: {value}" for key, value in report.items()))
    print("ok: it loads onto this base and erases as recorded")
