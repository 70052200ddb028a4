"""The documentation builds without a warning, needs nobody else's server, and shows code and commands that exist."""

import ast
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest
from cyclopts import CycloptsError, MissingArgumentError

import erasure
from erasure.cli.main import app
from erasure.families import NAMES
from erasure.registry import methods

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LOADS = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src")}
"""What a browser fetches to show a page."""
PLACEHOLDERS = {"METHOD": "uce", "word_swap": "uce"}
"""What pages write where another name goes: any method, and the one that add-a-method.md writes."""


def build(config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` runs. (With --quiet, mkdocs would not count warnings, and strict would mean nothing.)"""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})


@pytest.fixture(scope="module")
def tool() -> None:
    missing = [name for name in ("mkdocs", "material", "mkdocstrings_handlers.python") if not _installed(name)]
    if missing:
        assert os.environ.get("CI") != "1", f"{', '.join(missing)} is not installed: make install"
        pytest.skip(f"{', '.join(missing)} is not installed: pip install 'erasure-suite[docs]'")


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module")
def site(tool: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


class Loaded(HTMLParser):
    """Addresses that a page makes the browser fetch, and the classes of its elements."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.classes: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for key, value in attributes:
            if (tag, key) in LOADS and value:
                self.addresses.append(value)
            if key == "class" and value:
                self.classes |= set(value.split())


def test_every_page_is_built(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").is_file(), page


def test_a_fault_fails_the_build(tool: None, tmp_path: Path) -> None:
    config, page = tmp_path / "mkdocs.yml", tmp_path / "pages/index.md"
    config.write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: pages\nnav: [index.md]\n")
    page.parent.mkdir()
    for fault, passes in {"": True, "[a](gone.md)": False, "[a](#gone)": False, "::: erasure.gone": False, '--8<-- "gone"': False}.items():
        page.write_text(f"# A page\n\n{fault}\n")
        assert (build(config, tmp_path / "site").returncode == 0) == passes, fault


def test_the_site_needs_no_other_server(site: Path) -> None:
    """The theme fetches fonts, diagrams (class mermaid) and repository figures from elsewhere if it is asked to."""
    for page in site.rglob("*.html"):
        loaded = Loaded(page)
        assert len(loaded.addresses) >= 3, f"{page.name} has no style and no script?"
        assert [address for address in loaded.addresses if re.match(r"(\w+:)?//", address)] == [], page
        assert not {"mermaid", "md-source"} & loaded.classes, page
        if page.name != "404.html":  # which is served from any depth
            for address in loaded.addresses:
                assert address.startswith("data:") or (page.parent / re.split("[?#]", address)[0]).is_file(), (page, address)
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_the_reference_names_what_there_is(site: Path) -> None:
    """Made from docstrings, modules found by walking: a new method or seam is there without a line in docs/."""
    built = {name: (site / f"reference/{name}.html").read_text() for name in ("core", "methods", "seams", "eval")}
    for name in erasure.__all__:
        assert re.search(rf'id="erasure\.(\w+\.)?{name}"', built["core"]), name
    for page, room in (("methods", "methods"), ("eval", "eval"), ("seams", "erasure/seams")):
        for path in (ROOT / room).rglob("*.py"):
            parts = path.relative_to(ROOT / room).with_suffix("").parts
            module = ".".join(("erasure", page, *(part for part in parts if part != "__init__")))
            assert any(part.startswith("_") and part != "__init__" for part in parts) or f'id="{module}"' in built[page], module


def fences(page: Path, *languages: str) -> Iterator[tuple[str, str]]:
    """Place and text of a page's fenced blocks in a language."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        if found[2] in languages:
            yield f"{page.relative_to(ROOT)}:{text[: found.start()].count(chr(10)) + 1}", textwrap.dedent(found[3])


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """Place and words of each `erasure` command in a page's blocks, fenced or indented."""
    for number, line in _lines(page):
        if line.startswith("erasure "):
            yield f"{page.relative_to(ROOT)}:{number}", line


def _lines(page: Path) -> Iterator[tuple[int, str]]:
    """Lines of code blocks that no language claims but the shell's, with those joined that end in a backslash."""
    language, held, start = "", "", 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            language = "" if language else line.strip().strip("`") or "text"
            continue
        if not (language in ("bash", "sh", "shell", "console", "text") or (not language and line.startswith("    "))):
            continue
        start = start if held else number
        held += line.strip().removeprefix("$ ")
        if held.endswith("\\"):
            held = held[:-1]
            continue
        yield start, held
        held = ""


def mentions(page: Path) -> Iterator[tuple[str, str]]:
    """Place and words of each `erasure ...` in the running text."""
    text = re.sub(r"^ *```.*?^ *```", lambda m: "\n" * m[0].count("\n"), page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for found in re.finditer(r"(?<!`)`(erasure [^`]+)`(?!`)", text):
        yield f"{page.relative_to(ROOT)}:{text[: found.start()].count(chr(10)) + 1}", found[1]


def words(command: str) -> list[str]:
    command = re.split(r"\s[|>]\s|\s&&\s", command)[0]
    return [PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True)[1:]]


BLOCKS = [block for page in PAGES for block in fences(page, "python", "py")]
SHOWN = [command for page in PAGES for command in commands(page)]
MENTIONED = [mention for page in PAGES for mention in mentions(page)]


def test_the_pages_hold_something_to_check() -> None:
    assert len(BLOCKS) >= 5 and len(SHOWN) >= 12 and len(MENTIONED) >= 8


@pytest.mark.parametrize(("place", "code"), BLOCKS, ids=[place for place, _ in BLOCKS])
def test_python_compiles(place: str, code: str) -> None:
    """And what it imports from erasure is there."""
    tree = ast.parse(code, filename=place)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "erasure":
            module = __import__(str(node.module), fromlist=["*"])
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "erasure":
            assert hasattr(erasure, node.attr), f"{place}: erasure.{node.attr}"


@pytest.mark.parametrize(("place", "command"), SHOWN, ids=[place for place, _ in SHOWN])
def test_commands_parse(place: str, command: str) -> None:
    """Verb, flags and what they need; nothing is run."""
    app.parse_args(words(command), exit_on_error=False, print_error=False)


@pytest.mark.parametrize(("place", "command"), MENTIONED, ids=[place for place, _ in MENTIONED])
def test_mentioned_commands_exist(place: str, command: str) -> None:
    """Verb and flags; the text may leave out what a whole command needs."""
    given = words(command)
    if given == ["VERB"]:
        return
    try:
        app.parse_args(given, exit_on_error=False, print_error=False)
    except MissingArgumentError:
        pass


def test_a_wrong_command_would_be_found() -> None:
    for wrong in (
        "erasure eras uce --model canvas --concept dagger --out x",
        "erasure verify x --modell canvas",
        "erasure erase uce --model canvas --concept dagger --out x --alpha 1",
    ):
        with pytest.raises(CycloptsError):
            app.parse_args(words(wrong), exit_on_error=False, print_error=False)


def test_choosing_names_every_method_with_kind_and_families() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \|", (ROOT / "docs/choose-a-method.md").read_text(), re.MULTILINE)
    told = {name: (kind, set(NAMES if families == "all" else families.split(", "))) for name, kind, families in rows}
    assert told == {name: (entry.kind, set(methods.get(name).families)) for name, entry in methods.builtin.items()}
