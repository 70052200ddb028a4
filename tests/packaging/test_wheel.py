"""What a user installs: everything under ``erasure`` and nothing beside it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOUNTED = ("methods", "eval", "prompts")
LIMIT_MB = 60
NOT_PACKAGED = {".pyc"}


def sources() -> dict[str, Path]:
    """Every file of the packages, by the name that it must have in the wheel."""
    found = {}
    for folder in ("erasure", *MOUNTED):
        prefix = "erasure" if folder == "erasure" else f"erasure/{folder}"
        for path in (ROOT / folder).rglob("*"):  # rglob does not follow the links in erasure/
            inside = path.relative_to(ROOT / folder)
            hidden = any(part.startswith(".") for part in inside.parts)
            if path.is_file() and not path.is_symlink() and not hidden and path.suffix not in NOT_PACKAGED:
                found[f"{prefix}/{inside.as_posix()}"] = path
    return found


def build(tree: Path, out: Path, *, links: bool) -> Path:
    """The wheel of a copy of the checkout, made from its sdist, without network. ``links=False``: as git checks out on Windows."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("erasure", *MOUNTED):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in MOUNTED:
        link = tree / "erasure" / name
        assert link.is_symlink() and not link.readlink().is_absolute(), f"erasure/{name} is not a relative link"
        if not links:
            target = str(link.readlink())
            link.unlink()
            link.write_text(target)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module", params=[True, False], ids=["links", "no-links"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist"), links=request.param)


def test_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if not n.endswith("/")]
    assert len(names) == len(set(names))
    tops = {n.split("/")[0] for n in names}
    assert tops == {"erasure", next(t for t in tops if t.endswith(".dist-info"))}
    wanted = set(sources())
    assert {"erasure/py.typed", "erasure/methods/uce.py", "erasure/eval/stats.py", "erasure/prompts/suites/canvas.yaml"} <= wanted
    packaged = {n for n in names if n.startswith("erasure/")}
    assert sorted(wanted - packaged) == [], "missing from the wheel; see package-data in pyproject.toml"
    assert sorted(packaged - wanted) == [], "in the wheel, but not in the checkout"
    assert wheel.stat().st_size < LIMIT_MB * 1e6


def test_wheel_names_version_licence_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA")).rsplit("/", 1)[0]
        metadata = archive.read(f"{info}/METADATA").decode()
        commands = archive.read(f"{info}/entry_points.txt").decode()
        assert {f"{info}/licenses/LICENSE", f"{info}/licenses/erasure/canvas/NOTICE"} <= set(archive.namelist())
    initial = (ROOT / "erasure/__init__.py").read_text()
    version = next(line for line in metadata.splitlines() if line.startswith("Version: ")).removeprefix("Version: ")
    assert f'__version__ = "{version}"' in initial
    assert "License-Expression: Apache-2.0" in metadata
    assert "erasure = erasure.cli.main:main" in commands


def test_wheel_imports_under_its_own_names_only(wheel: Path, tmp_path: Path) -> None:
    """The wheel alone, away from the checkout: `methods`, `eval` and `prompts` are never modules of their own."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site')\n"
        "import erasure, erasure.methods, erasure.eval, erasure.prompts\n"
        "from erasure.registry import methods\n"
        "for name in methods.builtin: methods.get(name)\n"
        "assert erasure.methods.__file__.startswith(sys.argv[1]), erasure.methods.__file__\n"
        "print(*sorted({'methods', 'eval', 'prompts'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == []
