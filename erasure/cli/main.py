"""Entry point of the ``erasure`` command."""

import logging
import sys

from cyclopts import App, CycloptsError

from .. import __version__
from ..errors import ErasureError

app = App(
    name="erasure",
    help="Erase concepts from diffusers pipelines, ship what was fitted, and measure what it did.",
    help_epilogue=(
        "Examples:\n\n"
        "erasure bench --model canvas --concept dagger --methods negative_prompt,uce,safree --suite canvas-demo --out out/demo\n\n"
        "erasure erase uce --model stable-diffusion-v1-5/stable-diffusion-v1-5 --concept van-gogh --out out/van-gogh"
    ),
    version=__version__,
)
for verb in ("methods", "concepts", "suites"):
    app.command(f"erasure.cli.listing:{verb}", name=verb)
for verb in ("erase", "verify", "generate", "evaluate", "compare", "bench"):
    app.command(f"erasure.cli.{verb}:{'app' if verb == 'erase' else verb}", name=verb)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line: 0 done, 1 failed, 2 used wrongly."""
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(stderr=True)
    logging.getLogger("erasure").addHandler(RichHandler(console=console, show_path=False, show_time=False))
    try:
        app(arguments, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return 2  # cyclopts has printed what was wrong
    except ErasureError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
