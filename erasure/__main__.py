"""``python -m erasure``, for launchers such as ``accelerate launch -m erasure``."""

import sys

from .cli.main import main

sys.exit(main())
