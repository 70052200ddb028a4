"""Prompt files to rows: readers, pins, columns, filters, seeds; on harmless files made here."""

import gzip
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from erasure.concept import Concept, load
from erasure.errors import ErasureError, UnknownName
from erasure.eval import sources
from erasure.eval.filters import suggests_a_minor
from erasure.eval.readers import read_records
from erasure.eval.rows import Row
from erasure.eval.store import rows_hash
from erasure.eval.suite import Suite, load_suite

NOBODY = Concept("anything")
CSV = "text,key,s,g,w,h,tags,kind\n" + "\n".join(
    f'a red barn number {i},{i},{100 + i},{7 + i % 2},{64 + 8 * (i % 3)},64,"a, b",{"bad" if i % 2 else "good"}' for i in range(6)
)
COLUMNS = {"prompt": "text", "id": "key", "seed": "s", "guidance": "g", "width": "w", "height": "h", "category": "tags"}


@pytest.fixture(autouse=True)
def said_anew() -> None:
    sources.say.cache_clear()


def write(folder: Path, content: str = CSV, name: str = "set.csv") -> Path:
    path = folder / name
    path.write_text(content)
    return path


def make(
    folder: Path, *, file: dict[str, Any] | None = None, name: str = "set.csv", counts: dict[str, int] | None = None, **prompts: Any
) -> Suite:
    """A suite on a local file, read as a user's YAML would be."""
    source = {"folder": str(folder), "files": [{"path": name, **(file or {})}]}
    block = {"source": source, "content": "benign", "licence": "ours", "columns": COLUMNS, "kind": "other", **prompts}
    if "grid" in prompts or "asks" in prompts:
        del block["source"]
    protocol = {"scheduler": "DDIMScheduler", "steps": 2, "guidance": 7.5, "height": 64, "width": 64}
    data = {"name": "mine", "version": 1, "summary": "s", "source": "prompts", "ranked": True, "prompts": block, "protocol": protocol}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**data, **({"counts": counts} if counts else {})}))
    return load_suite(str(path))


def test_every_column_lands_where_the_suite_says(tmp_path: Path) -> None:
    write(tmp_path)
    kind = {"column": "kind", "values": {"good": "neighbour", "bad": "named"}}
    rows = make(tmp_path, kind=kind, columns={**COLUMNS, "keep": ["kind"]}).rows(NOBODY)
    assert rows[4] == Row(
        id="neighbour-00004",
        kind="neighbour",
        prompt="a red barn number 4",
        seed=104,
        guidance=7.0,
        height=64,
        width=72,
        categories=("a", "b"),
        meta=(("key", "4"), ("kind", "good")),
    )
    assert [row.id for row in rows[:2]] == ["neighbour-00000", "named-00001"] and rows[1].about == {"key": "1", "kind": "bad"}


def test_formats_say_the_same(tmp_path: Path) -> None:
    records = [{"text": f"t{i}", "n": str(i), "tags": "x, y"} for i in range(3)]
    listed = [{"text": r["text"], "n": int(r["n"]), "tags": ["x", "y"]} for r in records]
    marked = [{**r, "tags": {"x": True, "z": False, "y": True}} for r in listed]
    columns = {key: [r[key] for r in records] for key in records[0]}
    table = "text{0}n{0}tags\n" + "".join(f'{r["text"]}{{0}}{r["n"]}{{0}}"x, y"\n' for r in records)
    files = {
        "a.csv": "\ufeff" + table.format(","),
        "a.tsv": table.format("\t"),
        "a.json": json.dumps(listed),
        "b.json": json.dumps({"data": marked, "version": 2}),
        "c.json": json.dumps(columns),
        "a.jsonl": "\n".join(map(json.dumps, listed)),
    }
    for name, content in files.items():
        assert read_records(name, content.encode()) == records, name
    assert read_records("a.csv.gz", gzip.compress(files["a.csv"].encode())) == records
    assert read_records("a.txt", b"one\n\n two \x0b more\n") == [{"prompt": "one"}, {"prompt": "two \x0b more"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt\n", "a.csv has no rows"),
        ("a.csv", b"prompt,n\nx\n", "line 2 has another number of cells"),
        ("a.csv", b"prompt\n\xff\xfe\n", "not a .csv file"),
        ("a.json", b"{", "not a .json file"),
        ("a.json", b'{"a": 1}', "neither one list of rows nor"),
        ("a.json", b"[1]", "not a .json file"),
        ("a.pkl", b"", "from .csv, .tsv, .json.*not from '.pkl'"),
    ],
)
def test_what_is_no_table_of_prompts_is_refused_by_name(name: str, content: bytes, message: str) -> None:
    with pytest.raises(ErasureError, match=message):
        read_records(name, content)


def test_parquet_without_its_reader_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ErasureError, match="pip install pyarrow"):
        read_records("a.parquet", b"PAR1")


@pytest.mark.parametrize(
    ("content", "change", "message"),
    [
        (CSV.replace("text,", "txt,"), {}, r"no column 'text'; did you mean txt\? Known: txt, key, s"),
        (CSV.replace("barn number 3,3,", "barn,2,"), {}, "1 keys of the column 'key' come more than once: 2"),
        (CSV.replace("a red barn number 3", " "), {}, r"1 rows have no prompt \(row 4\); the filter has_prompt"),
        (CSV.replace(",103,", ",1x3,"), {}, "row 4 has '1x3' as s, which is no number"),
        (CSV.replace(",103,", ",nan,"), {}, "row 4 has 'nan' as s, which is no number"),
        (CSV.replace(",103,", ",1.5,"), {}, "row 4 has '1.5' as s: seeds are whole numbers"),
        (CSV.replace("64,64", "64,63"), {}, "row 1 asks for 63 pixels; sizes are multiples of 8"),
        (CSV, {"file": {"rows": 7}}, "set.csv has 6 rows, 7 are documented"),
        (CSV, {"counts": {"other": 5}}, r"its filters left \{'other': 6\}, documented are \{'other': 5\}"),
        (CSV, {"file": {"sha256": "0" * 64}}, r"has SHA-256 [0-9a-f]{64}, the suite is pinned to 0000.*--prompts"),
        (CSV, {"filters": [{"above": {"g": 8}}]}, r"no rows are left \(above \{'g': 8\}: 0 of 6 kept\)"),
        (CSV, {"filters": [{"above": {"gg": 8}}]}, "no column 'gg'; did you mean g"),
        (CSV, {"filters": [{"above": {"text": 8}}]}, "'text' is no number"),
        (CSV, {"kind": {"column": "kind", "values": {"good": "other"}}}, "kind is 'bad' in a row; the suite knows good"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, content: str, change: dict[str, Any], message: str) -> None:
    write(tmp_path, content)
    with pytest.raises(ErasureError, match=message):
        make(tmp_path, **change).rows(NOBODY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filters": ["no_minor"]}, "no filter rule 'no_minor'; did you mean no_minors"),
        ({"filters": [{"has_prompt": 1}]}, "has_prompt takes no argument"),
        ({"filters": [{"above": 3}]}, "above takes one column with its value"),
        ({"content": "sexual"}, "content is sexual has no_minors among its filters; it cannot be left out"),
        ({"content": "harmful", "filters": ["has_prompt"]}, "it cannot be left out"),
        ({"columns": {"prompts": "text"}}, "columns.prompts: unknown key"),
        ({"asks": {"any": {"neighbour": ["{retain}"]}}, "grid": {"template": "", "axes": {}}}, "exactly one of source, grid and asks"),
        ({"file": {"sha256": "abc"}}, "sha256"),
    ],
)
def test_a_suite_that_cannot_be_meant_is_refused_when_it_is_read(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ErasureError, match=message):
        make(tmp_path, **change)


SPEAKS_OF_MINORS = [
    "a child on a swing",
    "CHILDREN in the rain",
    "a group of Teenagers",
    "two schoolgirls wave",
    "a pre-teen with a kite",
    "toddler's shoes",
    "a 16 year old singer",
    "a 9-year-old with a drum",
    "singer, aged 15",
    "singer, age: 12",
    "seventeen years old singer",
    "a 14yo drummer",
    "un niño con un tambor",
    "a tee\u200bn band",
    "the kid's bicycle",
    "an under-age driver",
]
SPEAKS_OF_YOUTH = ["a girl with a drum", "young woman at a desk", "boys' choir", "das Mädchen am Fenster"]
SPEAKS_OF_NEITHER = [
    "a woman of 45 reads",
    "a 116 year old tower",
    "18 years old singer",
    "a house built 9 years ago",
    "page 12 of a book",
    "aged 70",
    "canteen with steel tables",
    "a cowboy-free farm of kidney beans",
    "a sonata for two violins",
]


@pytest.mark.parametrize("text", SPEAKS_OF_MINORS)
def test_prompts_that_suggest_minors_are_found_in_any_spelling(text: str) -> None:
    assert suggests_a_minor(text, "harmful") and suggests_a_minor(text, "sexual")


@pytest.mark.parametrize("text", SPEAKS_OF_YOUTH)
def test_where_content_is_sexual_the_words_reach_further(text: str) -> None:
    assert [suggests_a_minor(text, of) for of in ("harmful", "sexual", "mixed")] == [False, True, True]


@pytest.mark.parametrize("text", SPEAKS_OF_NEITHER)
def test_adults_and_things_stay(text: str) -> None:
    assert not suggests_a_minor(text, "sexual")


def test_the_rule_counts_reads_the_meaning_too_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "adv,means\nzinc plum,a statue\nfern knot,a girl with a drum\ngirl quartz,a statue\nlamp,a pier\n")
    suite = make(tmp_path, content="sexual", filters=["no_minors"], columns={"prompt": "adv", "meaning": "means"}, kind="attack")
    loaded = suite.load(NOBODY)
    assert [row.prompt for row in loaded.rows] == ["zinc plum", "lamp"] and [row.id for row in loaded.rows] == [
        "attack-00000",
        "attack-00003",
    ]
    assert [(s.rule, s.before, s.after, s.dropped) for s in loaded.steps] == [("no_minors", 4, 2, 2)]
    suite.rows(NOBODY)
    assert [m for m in caplog.messages if "no_minors" in m] == ["suite mine: no_minors: 2 of 4 kept"]


def test_filters_run_in_order_on_columns_and_labels(tmp_path: Path) -> None:
    write(tmp_path, CSV.replace('"a, b",bad', '"b, c",bad'))
    suite = make(tmp_path, filters=["has_prompt", {"one_of": {"tags": ["a", "z"]}}, {"at_most": {"s": 103}}])
    assert [(str(s)) for s in suite.load(NOBODY).steps] == [
        "has_prompt: 6 of 6 kept",
        "one_of {'tags': ['a', 'z']}: 3 of 6 kept",
        "at_most {'s': 103}: 2 of 3 kept",
    ]


def test_seeds_follow_the_position_or_a_list_and_do_not_move_with_filters(tmp_path: Path) -> None:
    write(tmp_path)
    plain = {"prompt": "text"}
    assert [r.seed for r in make(tmp_path, columns=plain, seed=50).rows(NOBODY)] == [50, 51, 52, 53, 54, 55]
    late = make(tmp_path, columns=plain, seed=50, filters=[{"above": {"s": 103}}]).rows(NOBODY)
    assert [(r.id, r.seed) for r in late] == [("other-00004", 54), ("other-00005", 55)]
    twice = make(tmp_path, columns=plain, seeds=[188, 288], filters=[{"above": {"s": 104}}]).rows(NOBODY)
    assert [(r.id, r.seed) for r in twice] == [("other-00005-0", 188), ("other-00005-1", 288)]
    ten = make(tmp_path, images_per_prompt=3, filters=[{"above": {"s": 104}}])
    assert [r.seed for r in ten.rows(NOBODY)] == [105, 106, 107]


def test_a_grid_asks_for_the_concept_and_calls_the_rest_its_neighbours() -> None:
    mini = load_suite("unlearncanvas-mini")
    rows = mini.rows(load("van-gogh"))
    named = [row for row in rows if row.kind == "named"]
    assert len(rows) == mini.size == 6 * 4 * 5 and len(named) == 4 * 5 and {row.about["style"] for row in named} == {"Van Gogh"}
    assert {row.seed for row in rows} == {188, 288, 588, 688, 888} and named[0].prompt == "A Dogs image in Van Gogh style."
    assert Counter(row.about["object"] for row in mini.rows(Concept("dogs")) if row.kind == "named") == {"Dogs": 30}
    with pytest.raises(UnknownName, match="Known: Van Gogh, Monet"):
        mini.rows(Concept("teapot"))


def test_neighbours_and_compositions_follow_from_the_concepts_own_words() -> None:
    concept = Concept("dagger", targets=("dagger", "dirk"), retain=("fork", "key"))
    assert [row.prompt for row in load_suite("neighbours").rows(concept)][:2] == ["a photo of fork", "a photo of key"]
    pairs = load_suite("compositions").rows(concept)
    assert len(pairs) == 2 * 2 * 2 and {(r.about["target"], r.about["retain"]) for r in pairs} == {
        (t, r) for t in ("dagger", "dirk") for r in ("fork", "key")
    }
    assert all(row.kind == "pair" and row.about["target"] in row.prompt and row.about["retain"] in row.prompt for row in pairs)
    style = load_suite("neighbours").rows(load("van-gogh"))
    assert all("in the style of" in row.prompt for row in style)
    with pytest.raises(ErasureError, match="add retain phrases"):
        load_suite("neighbours").rows(Concept("dagger"))


def test_a_concept_cannot_put_minors_beside_what_it_erases() -> None:
    concept = Concept("nudity", kind="content", targets=("nude person",), retain=("a statue", "a child"))
    assert {row.about["retain"] for row in load_suite("compositions").rows(concept)} == {"a statue"}


def test_a_local_file_with_the_pinned_bytes_is_the_suite_and_another_one_is_another(tmp_path: Path) -> None:
    path = write(tmp_path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    suite = make(tmp_path, file={"sha256": sha256, "rows": 6}, counts={"other": 6})
    (tmp_path / "elsewhere").mkdir()
    same = write(tmp_path / "elsewhere", CSV, "copy.csv")
    moved = suite.with_prompts(same)
    assert moved.hash == suite.hash and moved.ranked and rows_hash(moved.rows(NOBODY)) == rows_hash(suite.rows(NOBODY))
    folder = suite.with_prompts(tmp_path)
    assert folder.hash == suite.hash
    other = suite.with_prompts(write(tmp_path / "elsewhere", CSV + "\na shed,6,106,7,64,64,a,good", "other.csv"))
    assert other.hash != suite.hash and not other.ranked and len(other.rows(NOBODY)) == 7
    with pytest.raises(ErasureError, match="no prompts at"):
        suite.with_prompts(tmp_path / "nowhere.csv")
    with pytest.raises(ErasureError, match=r"has no file set\.csv"):
        suite.with_prompts(tmp_path / "elsewhere")
    with pytest.raises(ErasureError, match="leave out --prompts"):
        load_suite("canvas").with_prompts(path)


def test_a_suite_of_several_files_takes_a_folder(tmp_path: Path) -> None:
    six = load_suite("six-cd-nudity")
    with pytest.raises(ErasureError, match=r"the suite has 2: give a folder with Nudity\.csv, benign\.csv"):
        six.with_prompts(write(tmp_path))
    for name in ("Nudity.csv", "benign.csv"):
        write(tmp_path, "case_number,evaluation_seed,prompt\n0,1,a lamp\n1,2,a girl\n", name)
    rows = six.with_prompts(tmp_path).rows(NOBODY)
    assert [(r.kind, r.prompt, r.categories) for r in rows] == [("named", "a lamp", ("nudity",)), ("other", "a lamp", ("benign",))]


def test_github_files_are_fetched_once_checked_and_refetched_when_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, asked = b"prompt\na lamp\n", list[str]()

    class Answer:
        def __enter__(self) -> "Answer":
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self) -> bytes:
            return content

    def urlopen(url: str, timeout: float) -> Answer:
        asked.append(url)
        return Answer()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(sources.OFFLINE, raising=False)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    file = sources.File(path="data/set.csv", sha256=hashlib.sha256(content).hexdigest())
    source = sources.Source(github="owner/name", revision="c0ffee", files=(file,))
    for _ in range(2):
        assert sources.fetch(source, "mine")[0].data == content
    assert asked == ["https://raw.githubusercontent.com/owner/name/c0ffee/data/set.csv"]
    cached = tmp_path / "erasure" / "prompts" / "owner" / "name" / "c0ffee" / "data" / "set.csv"
    cached.write_bytes(b"prompt\nhalf")
    assert sources.fetch(source, "mine")[0].data == content and len(asked) == 2
    content = b"prompt\nchanged upstream\n"
    cached.unlink()
    with pytest.raises(ErasureError, match=r"set.csv of github.com/owner/name at c0ffee has SHA-256 \w+, the suite is pinned to"):
        sources.fetch(source, "mine")


def test_without_a_network_the_error_names_file_source_and_way_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(sources.OFFLINE, "1")
    with pytest.raises(ErasureError, match=r"unsafe-prompts4703.csv of github.com/chiayi-hsu/Ring-A-Bell at e4585ada0a5e.*--prompts FILE"):
        load_suite("i2p").rows(NOBODY)

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("401 Client Error: gated\nlong story")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(ErasureError, match=r"nsfw-adv-prompts.csv of hub data set YijunYang280.*gated\).*hf auth login.*--prompts"):
        load_suite("mma-diffusion").rows(NOBODY)


def test_a_hub_file_of_unknown_name_is_the_only_one_and_its_hash_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "prompt,evaluation_seed\nlamp cork,5\n", "some.csv")
    listed = ["README.md", "some.csv"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: listed)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name, **_: str(tmp_path / name))
    rows = load_suite("ring-a-bell-nudity").rows(NOBODY)
    assert [(r.prompt, r.seed, r.kind) for r in rows] == [("lamp cork", 5, "attack")]
    assert f"is not pinned; pin it with sha256: {hashlib.sha256(path.read_bytes()).hexdigest()}" in caplog.text
    listed.append("other.csv")
    with pytest.raises(ErasureError, match=r"2 files of prompts \(some.csv, other.csv\).*--prompts FILE"):
        load_suite("ring-a-bell-nudity").rows(NOBODY)
