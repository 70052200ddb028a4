"""The rules by which suites drop rows before anything is generated; each by name, each counted."""

import hashlib
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

from erasure.errors import ErasureError
from erasure.reading import read_yaml
from erasure.registry import unknown

from .readers import Record

Content = Literal["benign", "harmful", "sexual", "mixed"]
"""What the prompts of a suite ask for; mixed is harmful with sexual prompts among it."""
CONTENTS: tuple[Content, ...] = get_args(Content)
MINORS = "no_minors"
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen".split()
DIGITS = "one two three four five six seven eight nine".split()

Keep = Callable[[Record, tuple[str, ...]], bool]
"""Whether a record stays, given the columns with what the model is asked."""


@dataclass(frozen=True)
class Step:
    """What one rule did."""

    rule: str
    before: int
    after: int

    @property
    def dropped(self) -> int:
        return self.before - self.after

    def __str__(self) -> str:
        return f"{self.rule}: {self.after} of {self.before} kept"


def rule(name: str, argument: Any, content: Content) -> Keep:
    """The rule of that name; raises UnknownName, or ErasureError where its argument does not fit."""
    if name not in RULES:
        raise unknown("filter rule", name, RULES)
    return RULES[name](argument, content)


def describe(name: str, argument: Any = None) -> str:
    """A rule in one line, for people."""
    line = (RULES[name].__doc__ or "").strip().split("\n")[0]
    return line if argument is None else f"{line} {argument}"


def suggests_a_minor(text: str, content: Content) -> bool:
    """Whether the words of a prompt suggest a minor, by the rule ``no_minors``, which is meant to say yes too often.

    Where the content is sexual or mixed more words count, such as "girl"; see prompts/filters/no_minors.yaml.
    """
    return _minors(content in ("sexual", "mixed")).search(_plain(text)) is not None


def rules_digest() -> str:
    """SHA-256 of the words of ``no_minors``; part of the identity of every suite that uses it."""
    return hashlib.sha256(files("erasure.prompts.filters").joinpath("no_minors.yaml").read_bytes()).hexdigest()[:16]


def _has_prompt(argument: Any, content: Content) -> Keep:
    """Drops rows without a prompt; without this rule they are an error."""
    _no_argument("has_prompt", argument)
    return lambda record, asked: bool(record[asked[0]].strip())


def _no_minors(argument: Any, content: Content) -> Keep:
    """Drops prompts that suggest minors, by the words of prompts/filters/no_minors.yaml; never switched off."""
    _no_argument(MINORS, argument)
    return lambda record, asked: not any(suggests_a_minor(record[column], content) for column in asked)


def _one_of(argument: Any, content: Content) -> Keep:
    """Keeps rows whose column has one of some values (a comma separates several in one cell):"""
    column, wanted = _only("one_of", argument)
    values = {str(value) for value in (wanted if isinstance(wanted, list) else [wanted])}
    return lambda record, _: not values.isdisjoint(part.strip() for part in _cell(record, column).split(","))


def _above(argument: Any, content: Content) -> Keep:
    """Keeps rows whose column is a number above some other:"""
    column, limit = _only("above", argument)
    return lambda record, _: _number(record, column) > float(limit)


def _at_most(argument: Any, content: Content) -> Keep:
    """Keeps rows whose column is a number of at most some other:"""
    column, limit = _only("at_most", argument)
    return lambda record, _: _number(record, column) <= float(limit)


RULES: dict[str, Callable[[Any, Content], Keep]] = {
    "has_prompt": _has_prompt,
    MINORS: _no_minors,
    "one_of": _one_of,
    "above": _above,
    "at_most": _at_most,
}


@cache
def _minors(sexual: bool) -> re.Pattern[str]:
    lists = read_yaml(files("erasure.prompts.filters").joinpath("no_minors.yaml"), "no_minors.yaml")
    words = [*lists["words"], *(lists["sexual"] if sexual else ())]
    ages = "|".join(["(?:0?[0-9]|1[0-7])", *DIGITS, *TEENS])
    return re.compile(
        rf"(?<![a-z])(?:{'|'.join(map(re.escape, words))})(?:s|es|'s|s')?(?![a-z])"
        rf"|{'|'.join(map(re.escape, lists['stems']))}"
        rf"|(?<![a-z0-9.])(?:{ages}) ?(?:years?|yrs?|y ?/ ?o|yo|y\.o)(?![a-z])(?! ago)"
        rf"|(?<![a-z])age[ds]? ?(?:of )?:? ?(?:{ages})(?![a-z0-9])"
    )


def _plain(text: str) -> str:
    """Lower case, without accents and invisible characters, one space for every run of spaces, hyphens and underscores."""
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c) and unicodedata.category(c) != "Cf")
    return re.sub(r"[\s_\-‐-―]+", " ", "".join(letters).casefold())


def _no_argument(name: str, argument: Any) -> None:
    if argument is not None:
        raise ErasureError(f"the filter {name} takes no argument, got {argument!r}")


def _only(name: str, argument: Any) -> tuple[str, Any]:
    if not isinstance(argument, dict) or len(argument) != 1:
        raise ErasureError(f"the filter {name} takes one column with its value, such as {{{name}: {{column: value}}}}, got {argument!r}")
    return next(iter(argument.items()))


def _cell(record: Record, column: str) -> str:
    if column not in record:
        raise unknown("column", column, record, "as a filter asks for")
    return record[column]


def _number(record: Record, column: str) -> float:
    try:
        return float(_cell(record, column))
    except ValueError:
        raise ErasureError(f"the column {column!r} is no number in a row where a filter compares it: {record[column]!r}") from None
