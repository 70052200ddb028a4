"""A stranger's method, as docs/add-a-method.md prints it: installed as a package, checked, listed, benched; and a broken one beside it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BROKEN = '[project]\nname = "broken-method"\nversion = "0.1"\n[project.entry-points."erasure.methods"]\nbroken = "no_such_module:Method"\n'


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed both packages, without their dependencies."""
    text = (ROOT / "docs/add-a-method.md").read_text(encoding="utf-8")
    module, project = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)[0] for kind in ("python", "toml"))
    assert len([line for line in module.splitlines() if line.strip()]) <= 45, "forty lines, as the page says"
    parent, target = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("site")
    for name, files in {
        "word-swap": {"word_swap.py": module, "pyproject.toml": project},
        "broken-method": {"pyproject.toml": BROKEN + "[tool.setuptools]\npy-modules = []\n"},
    }.items():
        folder = parent / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_text(content, encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target), str(folder)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return target


def run(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=500, check=False)


def test_the_documented_method_keeps_the_contract(site: Path) -> None:
    code = "from erasure.testing import CHECKS, check_method\nfrom word_swap import WordSwap, swap\n"
    code += "assert swap('A Dagger, two daggers', [('dagger', 'cat')]) == 'A cat, two daggers'\n"
    code += "assert swap('two daggers', [('dagger', 'cat')], whole_words=False) == 'two cats'\n"
    code += "print(check_method(WordSwap, families=['sd1', 'sdxl', 'flux']) == 3 * len(CHECKS))\n"
    result = run(site, "-c", code)
    assert result.returncode == 0 and result.stdout.strip().endswith("True"), result.stderr


def test_it_is_listed_and_a_broken_one_beside_it_breaks_nothing(site: Path) -> None:
    result = run(site, "-m", "erasure", "methods", "--json")
    assert result.returncode == 0, result.stderr
    listed = {entry["method"]: entry for entry in json.loads(result.stdout)}
    assert listed["word_swap"]["summary"] == "Every target phrase in the prompt becomes its anchor."
    assert "broken:" in listed["broken"]["summary"] and "no_such_module" in listed["broken"]["summary"]
    assert {"uce", "safree", "negative_prompt"} <= listed.keys()
    help_page = run(site, "-m", "erasure", "erase", "word_swap", "--help")
    assert help_page.returncode == 0 and "--whole-words" in help_page.stdout and "only contain a target" in help_page.stdout
    broken = run(site, "-m", "erasure", "erase", "broken", "--model", "canvas", "--concept", "dagger", "--out", "nowhere")
    assert broken.returncode == 2 and "Traceback" not in broken.stderr


def test_it_is_benched_on_the_canvas(site: Path, tmp_path: Path) -> None:
    arguments = "bench --model canvas --concept dagger --methods word_swap --suite canvas-demo --limit 16 --steps 8".split()
    result = run(site, "-m", "erasure", *arguments, "--out", str(tmp_path / "out"), "--json")
    assert result.returncode == 0, result.stderr
    rows = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").rglob("results.json")}
    base, swapped = (next(r for r in rows.values() if r["name"] == name) for name in ("base", "word_swap"))
    named = {row["name"]: row["erased"]["named"]["target_present"]["rate"] for row in (base, swapped)}
    assert named["base"] > 0.5 and named["word_swap"] == 0, "a prompt without the word draws no dagger"
