"""``erasure verify``: does an artefact still do what it did?"""

import json as jsonlib

from .options import Base


def verify(artefact: str, base: Base, *, json: bool = False) -> None:
    """Check an artefact on its base: schema, hashes, fingerprint, changed tensors and canary; exit code 1 at the first failure.

    Example: erasure verify out/dagger-uce --model canvas

    Parameters
    ----------
    artefact: Folder that `erasure erase` wrote.
    json: Print JSON.
    """
    from .. import artifact

    report = artifact.verify(artefact, base.load())
    if json:
        print(jsonlib.dumps(report, indent=2))
        return
    print("\n".join(f"{key}: {value}" for key, value in report.items()))
    print("ok: it loads onto this base and erases as recorded")
