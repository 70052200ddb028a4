"""Peak memory of a stretch of work."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Peak:
    """Filled when the block that measured it ends."""

    megabytes: float | None = None


@contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Peak of GPU memory on cuda, else of the process's resident memory; where the system cannot reset its mark, since the start."""
    peak = Peak()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.megabytes = torch.cuda.max_memory_allocated(device) / 1e6
        return
    mark = Path("/proc/self/clear_refs")
    try:
        mark.write_text("5")  # Linux: set the high-water mark back to what is resident now
    except OSError:
        pass
    yield peak
    peak.megabytes = _resident()


def _resident() -> float:
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if match:
        return int(match[1]) * 1024 / 1e6
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
