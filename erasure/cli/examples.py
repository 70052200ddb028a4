"""Two commands for the end of every page of help, all of them on the embedded model; a test parses each one."""

import textwrap

EXAMPLES = {
    "": (
        "erasure bench --model canvas --concept dagger --methods negative_prompt,uce,safree --suite canvas-demo --out out/demo",
        "erasure erase uce --model canvas --concept dagger --out out/dagger-uce",
    ),
    "methods": ("erasure methods", "erasure methods --json"),
    "concepts": ("erasure concepts", "erasure concepts --json"),
    "suites": ("erasure suites --json", "erasure suites show canvas"),
    "suites show": ("erasure suites show canvas", "erasure suites show i2p --json"),
    "suites fetch": ("erasure suites fetch i2p --out prompts", "erasure suites fetch i2p --out prompts --json"),
    "recipes": ("erasure recipes", "erasure recipes --json"),
    "erase": (
        "erasure erase uce --model canvas --concept dagger --out out/dagger-uce",
        "erasure erase safree --model canvas --target bomb --target explosive --out out/bomb --alpha 0.02",
    ),
    "verify": (
        "erasure verify out/dagger-uce --model canvas",
        "erasure verify out/dagger-adv --model canvas-flow --component text_encoder",
    ),
    "export": (
        "erasure export out/dagger-uce --model canvas --format lora --error 0.05 --out out/dagger-lora",
        "erasure export out/dagger-uce --model canvas --format single --out out/dagger-checkpoint",
    ),
    "merge": (
        "erasure merge out/knife-dpo out/dagger-dpo --model canvas --out out/weapons-dpo",
        "erasure merge out/knife-dpo out/dagger-dpo --model canvas --rule ties --density 0.3 --rank 8 --out out/weapons-dpo --json",
    ),
    "generate": (
        "erasure generate out/dagger-uce --model canvas --suite canvas --out out/eval --shard 1/4",
        "erasure generate base --model canvas --concept dagger --suite canvas --out out/eval --dry-run",
    ),
    "evaluate": (
        "erasure evaluate out/dagger-uce --model canvas --suite canvas --out out/eval",
        "erasure evaluate out/dagger-adv --model canvas-flow --component text_encoder --suite canvas-demo --limit 16 --out out/look",
    ),
    "compare": (
        "erasure compare out/demo/results/base out/demo/results/uce",
        "erasure compare out/demo/results/base out/demo/results/uce --format markdown --html report.html",
    ),
    "sae": (
        "erasure sae train --model canvas --hookpoint text_encoder.layers.2 --out out/sae",
        "erasure sae detect --model canvas --concept dagger --prompts prompts.txt",
    ),
    "sae train": (
        "erasure sae train --model canvas --hookpoint text_encoder.layers.2 --out out/sae",
        "erasure sae train --model canvas --hookpoint text_encoder.layers.1 --latents 1024 --activation abstopk --out out/sae-1 --json",
    ),
    "sae inspect": (
        "erasure sae inspect --concept dagger --out dagger.html",
        "erasure sae inspect --concept dagger --json",
    ),
    "sae detect": (
        "erasure sae detect --model canvas --concept dagger --prompts prompts.txt",
        "erasure sae detect --model canvas --concept dagger --prompts prompts.txt --json",
    ),
    "bench": (
        "erasure bench --model canvas --concept dagger --methods negative_prompt,uce,safree --suite canvas-demo --out out/demo",
        "erasure bench --model canvas --concept pizza --concept bomb --methods uce --suite canvas --out out/uce --dry-run",
    ),
}
"""Verb, or verb and sub-verb ("" is the command itself) -> two examples."""
WIDTH = 78


def epilogue(verb: str) -> str:
    """The end of a verb's help."""
    return _render(EXAMPLES[verb])


def method_epilogue(name: str) -> str:
    """The end of the help of ``erase NAME``, the same for every method."""
    return _render(
        (
            f"erasure erase {name} --model canvas --concept dagger --out out/dagger-{name}",
            f"erasure erase {name} --model canvas --target bomb --anchor cake --retain candle --out out/bomb-{name} --dry-run",
        )
    )


def _render(examples: tuple[str, str]) -> str:
    return "Examples:\n" + "".join(f"\n{_folded(example)}\n" for example in examples)


def _folded(command: str) -> str:
    """A long command on several lines that a shell still reads as one."""
    lines = textwrap.wrap(command, WIDTH - 6, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return " \\\n  ".join(f"  {line}" if not i else line for i, line in enumerate(lines))
