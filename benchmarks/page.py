"""Tables that benchmarks write into pages of the documentation, between marks; what people wrote around them stays."""

from pathlib import Path

from erasure.errors import ErasureError

END = "<!-- to here -->"


def begin(script: str) -> str:
    return f"<!-- made by benchmarks/{script}: from here -->"


def put(page: Path, script: str, text: str) -> None:
    """Replace what stands between the marks of a script; a new page is made of them alone, a page without them raises ErasureError."""
    first = begin(script)
    old = page.read_text(encoding="utf-8") if page.exists() else f"# {page.stem}\n\n{first}\n{END}\n"
    before, found, rest = old.partition(first)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ErasureError(f"{page} lacks the lines {first!r} and {END!r}, between which the tables go: put them back")
    page.write_text(f"{before}{first}\n\n{text}\n\n{END}{after}", encoding="utf-8")
