"""The tests' methods are known by name."""

import pytest

from erasure.registry import Entry, methods


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.builtin, "low_rank", Entry("tests.export.common:LowRank", "test"))
    monkeypatch.setitem(methods.builtin, "random_lora", Entry("tests.stand_ins:RandomLoRA", "test"))
