"""Names, suggestions, and plug-ins that do not load."""

from importlib.metadata import EntryPoint

import pytest

from erasure import registry
from erasure.errors import ErasureError, UnknownName
from erasure.method import ErasureMethod
from erasure.registry import Registry, methods

GROUP = "erasure.methods"
PLUGINS = [
    EntryPoint("good", "erasure.methods.uce:UCE", GROUP),
    EntryPoint("gone", "no_such_module_anywhere:X", GROUP),
    EntryPoint("half", "erasure.methods.uce:NoSuchThing", GROUP),
    EntryPoint("uce", "no_such_module_anywhere:Impostor", GROUP),
]


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in PLUGINS if p.group == group])
    return Registry("method", GROUP, methods.builtin)


def test_every_built_in_loads_and_bears_its_name() -> None:
    for name in methods.builtin:
        cls = methods.get(name)
        assert issubclass(cls, ErasureMethod) and cls.name == name and cls.families
        assert methods.summaries()[name]


@pytest.mark.parametrize(("typed", "meant"), [("safre", "safree"), ("ucee", "uce"), ("negative-prompt", "negative_prompt")])
def test_did_you_mean(typed: str, meant: str) -> None:
    with pytest.raises(UnknownName, match=f"no method '{typed}'; did you mean {meant}") as caught:
        methods.get(typed)
    assert all(name in str(caught.value) for name in methods.names())


def test_a_name_like_none_lists_what_there_is() -> None:
    with pytest.raises(UnknownName, match=r"no method 'zzzz'\. Known: negative_prompt, uce, safree"):
        methods.get("zzzz")


def test_a_broken_plug_in_is_listed_and_breaks_nothing(plugged: Registry) -> None:
    assert plugged.names() == [*methods.builtin, "gone", "good", "half"]
    lines = plugged.summaries()
    assert lines["gone"].startswith("broken: ") and "no_such_module_anywhere" in lines["gone"]
    assert lines["half"].startswith("broken: ") and "NoSuchThing" in lines["half"]
    assert lines["good"].startswith("Unified Concept Editing")
    assert plugged.get("good") is methods.get("uce")
    with pytest.raises(ErasureError, match="gone"):
        plugged.get("gone")


def test_a_plug_in_cannot_take_the_name_of_a_built_in(plugged: Registry) -> None:
    assert plugged.get("uce") is methods.get("uce")
