"""``python -m erasure``, for launchers such as ``accelerate launch -m erasure``."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
