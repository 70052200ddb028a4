"""What the command line says, and exits with, when something goes wrong; None where it is a bug, which keeps its traceback."""

import errno
import json
import sys
from dataclasses import dataclass

from cyclopts import CycloptsError, UnknownCommandError, UnusedCliTokensError

from .. import __version__
from ..errors import ErasureError
from ..registry import methods, unknown
from .examples import EXAMPLES

BUG = f"This is a bug of erasure {__version__}: please report it in the project's issue tracker, with the command and all lines above."
SPACE = "free some space or choose a place with more; unfinished files were removed, and the same command goes on from here"
ELSEWHERE = "choose another place, or change its permissions"
FIXES = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EACCES: ELSEWHERE,
    errno.EPERM: ELSEWHERE,
    errno.EROFS: ELSEWHERE,
    errno.EEXIST: "choose another place, or remove what is there",
    errno.ENOTDIR: "a part of the path is a file; choose another place",
    errno.EISDIR: "give a file, not a folder",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""What to do about an error of the operating system; others are taken for bugs."""


@dataclass(frozen=True)
class Failure:
    """A message with cause and fix, and the exit code."""

    message: str
    exit_code: int = 2

    def show(self, as_json: bool) -> None:
        """To stderr, so that stdout holds results alone."""
        if as_json:
            print(json.dumps({"error": self.message, "exit_code": self.exit_code}, ensure_ascii=False), file=sys.stderr)
            return
        from rich.console import Console
        from rich.text import Text

        # Text, since a message may hold brackets that rich would take for markup.
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), self.message), soft_wrap=True, highlight=False)


def explain(error: BaseException) -> Failure | None:
    """What to say about an exception that reached the command line."""
    if isinstance(error, ErasureError):
        return Failure(str(error), error.exit_code)
    if isinstance(error, CycloptsError):
        return Failure(_usage(error))
    if isinstance(error, KeyboardInterrupt):
        return Failure("stopped; the same command goes on from here", 130)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("erasure"):
        return Failure(f"the package {error.name} is not installed: pip install 'erasure-suite[all]'")
    if (code := _errno(error)) in FIXES:
        place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        reason = error.strerror if isinstance(error, OSError) else "No space left on device"
        return Failure(f"{place}{reason}; {FIXES[code]}")
    return None


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors writes files in Rust and gives no errno
    return errno.ENOSPC if type(error).__name__ == "SafetensorError" and "No space left" in str(error) else None


def _usage(error: CycloptsError) -> str:
    """The parser's message; an unknown command gets the suggestions that all unknown names get, without importing the known ones."""
    chain = [name for name in error.command_chain or () if not name.startswith("-")]
    if isinstance(error, UnknownCommandError) and error.unused_tokens:
        from .main import VERBS

        typed = error.unused_tokens[0]
        if error.app is not None and error.app.name[0] == "erase":
            return str(unknown("method", typed, methods.names(), "see `erasure methods`"))
        return str(unknown("command", typed, VERBS, "see `erasure --help`"))
    below = [key.partition(" ")[2] for key in EXAMPLES if chain and key.startswith(f"{chain[0]} ")]
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens and len(chain) == 1 and below:
        return str(unknown(f"{chain[0]} command", error.unused_tokens[0], below, f"see `erasure {chain[0]} --help`"))
    return f"{str(error).rstrip()} See `{' '.join(['erasure', *chain, '--help'])}`"
