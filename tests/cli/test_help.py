"""Help: two examples at the end of every page, each of which parses; quick, and without torch where no method is asked for."""

import ast
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import fields, is_dataclass
from importlib import import_module
from itertools import pairwise

import pytest
from rich.console import Console

from erasure.cli.examples import EXAMPLES
from erasure.cli.main import VERBS, app, main
from erasure.registry import methods

PAGES = [*(verb.split() for verb in EXAMPLES), *(["erase", name] for name in methods.builtin)]
LIGHT = [["--help"], *([verb, "--help"] for verb in VERBS), ["methods"], ["concepts"], ["suites"], ["methods", "--json"], ["erase", "ucee"]]
SECONDS = 1.5
"""Three times what is promised, since a test machine may be busy; the promise itself is 0.5 s."""


def page(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*command, "--help"]) == 0
    return capsys.readouterr().out


def examples(text: str) -> list[list[str]]:
    """The commands at the end of a page, as a shell would read them."""
    end = text.partition("Examples:\n")[2]
    assert "│" not in end, "examples come last"
    return [shlex.split(command) for command in re.sub(r"\\\n", " ", end).split("\n") if command.strip()]


@pytest.mark.parametrize("command", PAGES, ids=" ".join)
def test_every_page_ends_with_two_examples_that_parse(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = examples(page(command, capsys))
    assert len(found) == 2
    for name, *arguments in found:
        assert name == "erasure" and arguments[: len(command)] == command
        _, bound, unused = app.parse_args(arguments, exit_on_error=False, print_error=False)
        assert not unused
        if command:  # the parser has really read the verb's own flags
            assert len(bound.arguments) > 0 or arguments == command


def test_every_verb_has_examples_of_its_own_and_is_described_once():
    assert {key.partition(" ")[0] for key in EXAMPLES} == {"", *VERBS}
    for path, summary in VERBS.values():
        module, _, name = path.partition(":")
        found = getattr(import_module(f"erasure.cli.{module}"), name)
        if not path.endswith(":app"):  # an app has no docstring
            assert (inspect.getdoc(found) or "").splitlines()[0] == summary


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field, its own or inherited, on one line."""
    classes = [base for base in reversed(cls.__mro__) if is_dataclass(base)]  # a class has the last word on its own
    body = [line for base in classes for line in ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body]  # type: ignore[attr-defined]
    return {
        field.target.id: " ".join(ast.literal_eval(doc.value).split())
        for field, doc in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(doc, ast.Expr)
    }


@pytest.mark.parametrize("name", methods.builtin)
def test_help_of_a_method_has_type_default_and_docstring_of_every_field(name):
    wide = io.StringIO()
    app.help_print(["erase", name], console=Console(width=2000, file=wide))
    text = " ".join(wide.getvalue().replace("│", " ").split())
    cls = methods.get(name)
    for field in fields(cls):
        flag = f"--{field.name.replace('_', '-')}"
        kind = rf"( FLOAT| INT| CHOICE| STR| --no-{flag[2:]})"
        shown = re.escape(str(field.default) or '""')
        default = "" if field.default in (None, ()) else rf" (\[choices: [^]]*\] )?\[default: {shown}\]"
        assert re.search(rf" {flag}{kind}\S*( --empty-\S+)? {re.escape(field_docs(cls)[field.name])}{default}", text), (flag, text)
    assert not fields(cls) or (cls.__doc__ or "").strip().splitlines()[0] in text


def test_the_static_table_of_methods_says_what_the_classes_say():
    from erasure.registry import kind_of

    for name, entry in methods.builtin.items():
        cls = methods.get(name)
        assert (set(entry.families.split()), entry.kind) == (set(cls.families), kind_of(cls)), name


def fresh(arguments: list[str]) -> tuple[float, list[str]]:
    """Seconds and heavy modules of a command in a new interpreter."""
    code = (
        "import json, sys\nfrom erasure.cli.main import main\n"
        f"main({arguments!r})\n"
        "print(json.dumps([m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'scipy') if m in sys.modules]))"
    )
    start = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    end = os.times()
    assert done.returncode == 0, done.stderr[-2000:]
    return end.children_user + end.children_system - start.children_user - start.children_system, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_help_and_listings_are_quick_and_load_nothing_heavy(arguments):
    seconds, heavy = fresh(arguments)
    assert heavy == []
    assert seconds < SECONDS


def test_a_reader_that_goes_away_is_no_traceback():
    command = f"{shlex.quote(sys.executable)} -m erasure.cli.main concepts --json | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[" and done.stderr == ""
