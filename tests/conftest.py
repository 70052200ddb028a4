"""Tests run on one thread: the models are tiny, and results do not depend on the machine's cores."""

import logging
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """The command line sets how much is logged (--quiet), for its process; the next test wants to hear everything again."""
    log = logging.getLogger("erasure")
    level, handlers = log.level, log.handlers
    yield
    log.setLevel(level)
    log.handlers = handlers
