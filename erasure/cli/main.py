"""Entry point of the ``erasure`` command.

Exit codes: 0 done; 1 a check failed (a damaged artefact, a canary that does not move), and with a traceback a bug; 2 used wrongly, with
cause and fix in the message; 130 stopped by Ctrl-C; 141 the reader of a pipe went away.
"""

import logging
import os
import sys
from dataclasses import fields
from typing import Annotated

from cyclopts import App, Group, Parameter

from .. import __version__
from ..errors import ErasureError
from ..registry import methods
from .examples import epilogue
from .failures import BUG, explain

VERBS = {
    "methods": ("listing:methods", "List erasure methods, plug-ins included, and what was measured of each."),
    "concepts": ("listing:concepts", "List concepts: shipped files, and the words of the canvas."),
    "suites": ("suites:app", "List evaluation suites; show or fetch one."),
    "recipes": ("recipes:recipes", "List recipes: when an image counts as unsafe, as each paper had it."),
    "erase": ("erase:app", "Fit a method on concepts and save the artefact."),
    "verify": ("verify:verify", "Check an artefact on its base: schema, hashes, fingerprint, changed tensors and canary."),
    "export": ("export:export", "Write an artefact in a form that other tools load, and compare that with the attached eraser."),
    "merge": ("merge:merge", "Merge LoRA experts into one artefact."),
    "generate": ("generate:generate", "Make a suite's images with an artefact, or with the base."),
    "evaluate": ("evaluate:evaluate", "Score an artefact on a suite against the base."),
    "compare": ("compare:compare", "Compare results of one protocol, side by side."),
    "sae": ("sae:app", "Train sparse autoencoders of text encoders, look into them, and detect concepts by them."),
    "bench": ("bench:bench", "Erase, generate, score and compare, from nothing to table and report."),
}
"""Verb -> where it is, and what it does; imported when it is called."""
ALONE = ("export", "merge", "bench")
"""Verbs whose work no launcher can share."""

app = App(
    name="erasure",
    help="Erase concepts from diffusers pipelines, ship what was fitted, and measure what it did.",
    help_format="plaintext",
    help_epilogue=epilogue(""),
    version=__version__,
    suppress_keyboard_interrupt=False,  # main says that the command can go on, which cyclopts would not
)
for _verb, (_path, _summary) in VERBS.items():
    _end = {} if _path.endswith(":app") else {"help_epilogue": epilogue(_verb)}  # an app of its own has its own end
    app.command(f"erasure.cli.{_path}", name=_verb, help=_summary, **_end)

app.meta.suppress_keyboard_interrupt = False
EVERYWHERE = Group("Everywhere", sort_key=99)


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    verbose: Annotated[bool, Parameter(name=("--verbose", "-v"), negative=(), group=EVERYWHERE, help="Say what is done.")] = False,
    quiet: Annotated[bool, Parameter(name=("--quiet", "-q"), negative=(), group=EVERYWHERE, help="No progress, no warnings.")] = False,
) -> None:
    """Set how much is said, then run the verb."""
    from rich.console import Console
    from rich.logging import RichHandler

    from erasure.eval.engines.ranks import Rank

    log = logging.getLogger("erasure")
    log.handlers = [RichHandler(console=Console(stderr=True), show_path=False, show_time=False)]
    rank = Rank.here()
    log.setLevel(logging.ERROR if quiet or not rank.first else logging.INFO if verbose else logging.WARNING)
    if rank.count > 1 and (command := _alone(tokens)):
        raise ErasureError(f"`erasure {command}` is the work of one process, the launcher started {rank.count}: run it without launcher")
    if not rank.first and "--dry-run" in tokens:
        return  # the first one says it
    app(tokens, exit_on_error=False, print_error=False, result_action="return_value")


def _alone(tokens: tuple[str, ...]) -> str:
    """The command, if no launcher can share its work, else "". Fits are shared by micro-batches, which not all methods take."""
    if tokens[:1] == ("erase",) and tokens[1:] and tokens[1] in methods.names():
        return "" if "accumulation" in {field.name for field in fields(methods.get(tokens[1]))} else f"erase {tokens[1]}"
    return tokens[0] if tokens and tokens[0] in ALONE else ""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and give its exit code; a bug leaves as the exception that it is."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app.meta(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except BrokenPipeError:  # such as `erasure concepts | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        failure = explain(error)
        if failure is None:
            error.add_note(BUG)
            raise
        failure.show("--json" in arguments)
        return failure.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
