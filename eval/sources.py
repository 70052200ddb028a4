"""Where the files of a prompt suite come from, and how they are brought here and checked."""

import hashlib
import logging
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, model_validator

from erasure.errors import ErasureError

from .readers import READERS
from .rows import Kind

log = logging.getLogger("erasure")

OFFLINE = "HF_HUB_OFFLINE"
"""The hub's own environment variable: nothing is downloaded, from anywhere, while it is set."""


class File(BaseModel):
    """One file of a source, and what is known of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = None
    """Within the repository; None where nobody documented it: the only file of prompts that the repository has."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """None: unpinned, because its bytes were never seen by who wrote the suite."""
    rows: int | None = Field(default=None, gt=0)
    """Before any filter, as documented."""
    kind: Kind | None = None
    """Of all its rows."""
    category: str | None = None
    """Of all its rows."""


class Source(BaseModel):
    """A repository with files of prompts: on the hub, on GitHub, in this package, or a local folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hub: str | None = None
    """Id of a data set on the Hugging Face hub."""
    github: str | None = None
    """owner/name."""
    package: str | None = None
    """Folder of erasure.prompts."""
    folder: Path | None = None
    """Local folder; files lie in it by their names, whatever folders they have in their repository."""
    revision: str | None = None
    """Commit; None: unpinned, the newest."""
    files: tuple[File, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_place(self) -> "Source":
        if sum(place is not None for place in (self.hub, self.github, self.package, self.folder)) != 1:
            raise ValueError("give exactly one of hub, github, package and folder")
        if self.github is not None and self.revision is None:
            raise ValueError("a GitHub source needs the revision (a commit): its files are fetched one by one")
        if self.hub is None and any(file.path is None for file in self.files):
            raise ValueError("only a hub source may leave a file's path open")
        return self

    @property
    def pinned(self) -> bool:
        """Whether every byte is known in advance."""
        return all(file.sha256 for file in self.files)

    @property
    def rows(self) -> int | None:
        """Before any filter, where that is documented for every file."""
        return None if any(f.rows is None for f in self.files) else sum(f.rows or 0 for f in self.files)

    def __str__(self) -> str:
        at = f" at {self.revision[:12]}" if self.revision else "" if self.package or self.folder else " at its newest revision"
        if self.folder is not None:
            return str(self.folder)
        place = f"hub data set {self.hub}" if self.hub else f"github.com/{self.github}" if self.github else "this package"
        return place + at


@dataclass(frozen=True)
class Fetched:
    """A file's content, checked against its pin where it has one."""

    file: File
    name: str
    data: bytes
    sha256: str


def fetch(source: Source, suite: str) -> list[Fetched]:
    """Every file of a source, from the cache where it is there. ``suite``: its name, for messages.

    Raises ErasureError when a file cannot be had, naming it, its source and the way around, or when it has other bytes than pinned.
    """
    return [_checked(source, file, *_read(source, file, suite), suite) for file in source.files]


def local(source: Source, path: Path) -> Source:
    """The source with its files read from a local file, or by their names from a local folder.

    A file with other bytes than pinned is accepted: it is another set, with its own hash and an unknown number of rows. Where
    nothing is pinned there is nothing to compare, and the hash of the rows alone tells two files apart.
    """
    path = path.expanduser()
    if not path.exists():
        raise ErasureError(f"no prompts at {path}: give the file, or the folder that `erasure suites fetch` wrote")
    if path.is_file() and len(source.files) > 1:
        names = ", ".join(PurePosixPath(f.path or "").name for f in source.files)
        raise ErasureError(f"{path} is one file, the suite has {len(source.files)}: give a folder with {names}")
    kept = []
    for file in source.files:
        at = path if path.is_file() else _inside(path, file)
        found = file.sha256 and hashlib.sha256(at.read_bytes()).hexdigest()
        kept.append(file.model_copy(update={"path": at.name, "sha256": found, "rows": file.rows if found == file.sha256 else None}))
    return Source(folder=path.parent if path.is_file() else path, files=tuple(kept))


def _inside(folder: Path, file: File) -> Path:
    if file.path is not None:
        if (at := folder / PurePosixPath(file.path).name).is_file():
            return at
        raise ErasureError(f"{folder} has no file {at.name}")
    readable = sorted(p for p in folder.iterdir() if _readable(p.name))
    if len(readable) != 1:
        raise ErasureError(f"{folder} should hold one file of prompts, it has {len(readable)}: name the file itself")
    return readable[0]


def _readable(name: str) -> bool:
    return any(name.removesuffix(".gz").endswith(ending) for ending in READERS if ending != ".txt")


def _read(source: Source, file: File, suite: str) -> tuple[str, bytes]:
    """A file's name and content."""
    try:
        if source.package is not None:
            return str(file.path), files(f"erasure.prompts.{source.package}").joinpath(str(file.path)).read_bytes()
        if source.folder is not None:
            return str(file.path), (source.folder / str(file.path)).read_bytes()
        path = _from_hub(source, file) if source.hub else _from_github(source, file)
        return path.name, path.read_bytes()
    except (OSError, ValueError) as error:  # the hub's errors and urllib's are OSErrors; ValueError: a bad id
        raise ErasureError(
            f"suite {suite}: {file.path or 'its file'} of {source} cannot be had ({_first_line(error)}). "
            f"Get it on a machine with access, or with `hf auth login` where the set is gated, and pass --prompts FILE"
        ) from error


def _from_hub(source: Source, file: File) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    path = file.path
    if path is None:
        readable = [p for p in HfApi().list_repo_files(str(source.hub), repo_type="dataset", revision=source.revision) if _readable(p)]
        if len(readable) != 1:
            raise OSError(f"it has {len(readable)} files of prompts ({', '.join(readable)}), and the suite does not say which")
        path = readable[0]
    return Path(hf_hub_download(str(source.hub), path, repo_type="dataset", revision=source.revision))


def _from_github(source: Source, file: File) -> Path:
    """The file in our cache, by its revision; fetched when it is not there."""
    cached = cache_folder() / str(source.github) / str(source.revision) / str(file.path)
    if cached.is_file() and file.sha256 in (None, hashlib.sha256(cached.read_bytes()).hexdigest()):
        return cached
    if os.environ.get(OFFLINE, "").lower() in ("1", "true", "yes", "on"):
        raise OSError(f"{OFFLINE} is set, and the file is not in {cache_folder()}")
    url = f"https://raw.githubusercontent.com/{source.github}/{source.revision}/{file.path}"
    log.info("fetching %s", url)
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            data = answer.read()
    except urllib.error.HTTPError as error:
        raise OSError(f"{url} answers {error.code} {error.reason}") from error
    cached.parent.mkdir(parents=True, exist_ok=True)
    draft = cached.with_name(f".{cached.name}-{os.getpid()}")
    draft.write_bytes(data)
    os.replace(draft, cached)
    return cached


def cache_folder() -> Path:
    """Where files from GitHub are kept; the hub has its own cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "erasure" / "prompts"


def _checked(source: Source, file: File, name: str, data: bytes, suite: str) -> Fetched:
    found = hashlib.sha256(data).hexdigest()
    if file.sha256 is None and source.package is None:
        say(f"suite {suite}: {name} of {source} is not pinned; pin it with sha256: {found}")
    elif file.sha256 not in (None, found):
        raise ErasureError(
            f"suite {suite}: {name} of {source} has SHA-256 {found}, the suite is pinned to {file.sha256}. It is another file: "
            "fetch it again, or give it with --prompts, which makes results of their own hash"
        )
    return Fetched(file, name, data, found)


@cache
def say(message: str) -> None:
    """A warning, once however often a file is read."""
    log.warning(message)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
