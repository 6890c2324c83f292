"""Files of every format give the same rows. Files that are cut, damaged or of another kind raise errors, and are never
skipped silently."""

from __future__ import annotations

import gzip
import json
import random
import tempfile
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from row_formats import COLUMNS, PACKERS, TABLES, WRITERS, iter_numbered_rows, write_row_file

from align.core.errors import CorruptFile, InputError
from align.data.read.files import DataFile, compute_read_share
from align.data.read.json_rows import MAX_ROW_BYTES
from align.data.read.rows import iter_rows, iter_valid_rows

FLAT = [{"prompt": f'Frage {i}?\nÄ "b", c;\td', "completion": f"é{i}\U0001f600", "n": str(i)} for i in range(11)]
NESTED = [{"messages": [{"role": "user", "content": f"ä{i}"}], "n": i, "flag": i % 2 == 0} for i in range(11)]


def number_rows(records: list[Any]) -> list[tuple[int, Any]]:
    return list(enumerate(records, start=1))


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_its_rows(tmp_path: Path, name: str, packed: str) -> None:
    path = write_row_file(tmp_path, name, FLAT, packed)
    assert list(iter_numbered_rows(str(path))) == number_rows(FLAT)
    for skip in (0, 1, 3, 5, 10, 11, 99):
        assert list(iter_numbered_rows(path, skip=skip)) == number_rows(FLAT)[skip:]


@pytest.mark.parametrize("name", sorted(set(WRITERS) - set(TABLES)))
def test_lists_and_numbers_keep_their_types(tmp_path: Path, name: str) -> None:
    assert [data for _, data in iter_numbered_rows(write_row_file(tmp_path, name, NESTED))] == NESTED


@pytest.mark.parametrize("said", ["d.jsonl", "d.csv", "d.txt", "d"])
@pytest.mark.parametrize("name", WRITERS)
def test_what_a_file_holds_counts_more_than_its_name(tmp_path: Path, name: str, said: str) -> None:
    """Exceptions are tables of one column, and objects that hold rows: a `.jsonl` of one line may be one row."""
    if said == "d.jsonl" and name == "held.json":
        return
    path = write_row_file(tmp_path, name, FLAT).rename(tmp_path / said)
    assert list(iter_numbered_rows(path)) == number_rows(FLAT)
    for packed in (".gz", ".zst"):
        (tmp_path / f"{said}{packed}").write_bytes(PACKERS[packed](path.read_bytes()))
        assert list(iter_numbered_rows(tmp_path / f"{said}{packed}")) == number_rows(FLAT)
        (tmp_path / f"packed{packed}-{said}").write_bytes(PACKERS[packed](path.read_bytes()))
        assert list(iter_numbered_rows(tmp_path / f"packed{packed}-{said}")) == number_rows(FLAT)


def test_an_object_a_line_is_a_row_where_its_list_is_part_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    chat = {"id": 1, "messages": [{"role": "user", "content": "a"}]}
    path.write_text(json.dumps(chat) + "\n")
    assert list(iter_numbered_rows(path)) == [(1, chat)]
    document = {"id": 1, "sources": [{"url": "a"}], "text": "b"}
    path.write_text(json.dumps(document) + "\n" + json.dumps(document))
    assert list(iter_numbered_rows(path)) == number_rows([document, document])
    path.with_suffix(".jsonl").write_text(json.dumps(document) + "\n")
    assert list(iter_numbered_rows(path.with_suffix(".jsonl"))) == [(1, document)]


def test_values_that_json_has_not_are_written_as_json_lines_write_them(tmp_path: Path) -> None:
    record = {
        "when": datetime(2026, 1, 2, 3, tzinfo=UTC),
        "day": datetime(2026, 1, 2).date(),
        "price": Decimal("1.50"),
        "inner": [{"when": datetime(2026, 1, 2, 3)}],
    }
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "d.parquet")
    ((_, row),) = iter_numbered_rows(tmp_path / "d.parquet")
    assert row == {
        "when": "2026-01-02T03:00:00+00:00",
        "day": "2026-01-02",
        "price": 1.5,
        "inner": [{"when": "2026-01-02T03:00:00"}],
    }
    names = pa.array([[("a", 1), ("b", 2)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"counts": names, "kind": pa.array(["x"]).dictionary_encode()}), tmp_path / "m.parquet")
    assert list(iter_numbered_rows(tmp_path / "m.parquet")) == [(1, {"counts": {"a": 1, "b": 2}, "kind": "x"})]


def test_a_map_in_a_struct_leaves_the_null_beside_it(tmp_path: Path) -> None:
    kind = pa.struct([("note", pa.string()), ("counts", pa.map_(pa.string(), pa.int64()))])
    column = pa.array([{"note": None, "counts": [("a", 1)]}], kind)
    pq.write_table(pa.table({"meta": column}), tmp_path / "m.parquet")
    ((_, row),) = iter_numbered_rows(tmp_path / "m.parquet")
    assert row["meta"]["note"] is None


# Truncated files.

MANY = [{"prompt": f"Question {i}? {'x' * (i * 7 % 50)}", "completion": f"Answer {i}."} for i in range(300)]


def read_until_error(path: Path) -> tuple[list[tuple[int, Any]], InputError | None]:
    """Return the rows of a file up to its end or first error, and that error or None."""
    read_rows = []
    try:
        for number, data in iter_numbered_rows(path):
            read_rows.append((number, data))
    except InputError as error:
        return read_rows, error
    return read_rows, None


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_was_cut_is_told(tmp_path: Path, name: str, packed: str) -> None:
    """Files are cut at every tenth of their length and within their last bytes. A cut at the end of a row of plain text
    cannot be detected; a row that is cut is a bad row."""
    content = write_row_file(tmp_path, name, MANY, packed).read_bytes()
    path = tmp_path / f"cut-{name}{packed}"
    plain_text = not packed and name in ("d.jsonl", "lines.json", *TABLES)
    cuts = {len(content) * tenth // 10 for tenth in range(10)} | {len(content) - n for n in (1, 2, 4, 8, 9)}
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        read_rows, error = read_until_error(path)
        corrupt = isinstance(error, CorruptFile) or (cut == 0 and error is not None)  # a table without a header
        assert error is None or str(path) in str(error)
        good = [(number, data) for number, data in read_rows if not isinstance(data, InputError)]
        if not plain_text:
            assert corrupt, f"cut at {cut} of {len(content)}: {len(read_rows)} rows"
        elif not corrupt:  # the last row alone may be wrong, or look shorter
            lines = content[:cut].removeprefix(b"\xef\xbb\xbf").count(b"\n")
            assert len(read_rows) >= lines - (name in TABLES)
            good = good[:-1]
        assert good == number_rows(MANY)[: len(good)]


@pytest.mark.parametrize("packed", PACKERS)
def test_a_stream_that_was_cut_between_two_batches_is_told(tmp_path: Path, packed: str) -> None:
    """Arrow itself accepts the end of the file as the end of the stream."""
    content = write_row_file(tmp_path, "stream.arrow", FLAT).read_bytes()
    path = tmp_path / f"d.arrow{packed}"
    path.write_bytes(PACKERS[packed](content[:-8]))
    assert len(list(pyarrow.ipc.open_stream(pa.BufferReader(content[:-8])))) == 4
    with pytest.raises(CorruptFile, match="ends after row 11 without the mark"):
        list(iter_numbered_rows(path))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_damage_within_a_packed_file_is_told(tmp_path: Path, packed: str) -> None:
    path = write_row_file(tmp_path, "d.jsonl", MANY, packed)
    blob = bytearray(path.read_bytes())
    for i in range(len(blob) // 2, len(blob) // 2 + 8):
        blob[i] ^= 0xFF
    path.write_bytes(bytes(blob))
    with pytest.raises(CorruptFile, match=r"cannot be unpacked after row \d+"):
        list(iter_numbered_rows(path))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'[{"a": 1}, {"a": 2}', "is no JSON after row 2"),
        (b'[{"a": 1} {"a": 2}]', "is no JSON after row 1"),
        (b'[{"a": 1}, ]', "is no JSON after row 1"),
        (b'[{"a": 1}] {"a": 2}', "there is more text after its end"),
        (b'[{"a": nul}]', "is no JSON after row 0"),
        (b'{"x": [{"a": 1}], "y": [{"a": 2}]}', r"lists of rows \(x, y\)"),
        (b"[" + b"9" * 5000 + b"]", "is no JSON after row 0"),
        (b'[{"a": ' + b"[" * 20000, "nested too deeply"),
        (b'{"data": [{"a": 1}', "is no JSON after row 1"),
        (b'{"data": [{"a": 1}], "n": ', "is no JSON after row"),
        (b'[{"a": "' + b"x" * MAX_ROW_BYTES + b'"}, {"a": 2}]', "a value of more than 32 MiB"),
    ],
)
def test_an_array_that_is_none_is_told(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem):
        list(iter_numbered_rows(path))


# Bad rows: each has an error with its place, and the rows after it are read.

GOOD = b'{"text": "a"}\n'


def list_bad_rows(path: Path) -> list[tuple[int, str]]:
    """Return the number and the problem of each bad row, and assert that all other rows are good."""
    all_rows = list(iter_rows(path))
    assert all(row.data == {"text": "a"} for row in all_rows if row.error is None)
    assert all(row.error.field.startswith(f"{path}, row {row.number}") for row in all_rows if row.error is not None)
    assert all_rows[-1].error is None
    return [(row.number, row.error.problem) for row in all_rows if row.error is not None]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (b'{"text": "a", "text": "b"}', "stands twice"),
        (b'{"a": [{"b": 1, "b": 1}]}', "stands twice"),
        (b'{"text": "a\\u0000"}', "NUL"),
        (b'{"a\\u0000": "a"}', "NUL"),
        (b'{"text": "a\x00"}', "NUL"),
        (b'{"text": "\\ud83d"}', "half a character"),
        (b'{"text": "\xe9"}', "UTF-8"),
        (b"3", "not an object"),
        (b'{"text": ' + b"[" * 90 + b"]" * 90 + b"}", "nested too deeply"),
    ],
)
def test_a_bad_row_of_json_ends_nothing(tmp_path: Path, bad: bytes, problem: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + bad + b"\n" + GOOD)
    ((number, reason),) = list_bad_rows(path)
    assert number == 2
    assert problem in reason
    if b"\x00" not in bad:  # NUL is no byte of JSON, so the end of an array with it cannot be found
        path.write_bytes(b"[" + GOOD + b"," + bad + b"," + GOOD + b"]")
        ((number, reason),) = list_bad_rows(path)
        assert (number, problem in reason) == (2, True)


def test_whole_characters_and_escapes_pass(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('\ufeff{"a": "\\ud83d\\ude00 \\\\ud83d \\\\u0000 é"}\n')
    assert list(iter_numbered_rows(path)) == [(1, {"a": "\U0001f600 \\ud83d \\u0000 é"})]


def test_a_line_over_the_limit_is_passed_over(tmp_path: Path) -> None:
    for name in ("d.jsonl", "d.jsonl.gz", "d.csv"):
        path = tmp_path / name
        long = b'{"text": "' + b"x" * (2 * MAX_ROW_BYTES) + b'"}\n'
        content = GOOD + long + GOOD if "csv" not in name else b"text\na\n" + long + b"a\n"
        path.write_bytes(PACKERS[path.suffix](content) if name.endswith("gz") else content)
        assert list_bad_rows(path) == [(2, "a line of more than 32 MiB")]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (b"a,b", "another number of cells (2 cells, and the header has 1)"),
        (b"\xe9", "not text in UTF-8"),
        (b"a\x00", "NUL"),
        (b'"a"b', "no row of a table"),
    ],
)
def test_a_bad_row_of_a_table_ends_nothing(tmp_path: Path, bad: bytes, problem: str) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b"text\na\n\n" + bad + b"\na\n")
    ((number, reason),) = list_bad_rows(path)
    assert number == 2
    assert problem in reason


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a,,b\n1,2,3\n", "a column without a name"),
        (b"a,b,a\n1,2,3\n", "several columns called a"),
        (b'a,b\n1,"2\n', "ends within a quoted cell"),
        (b'"a,b\n', "no header"),
        (b"a\x00,b\n1,2\n", "NUL"),
        ("a,b\n1,2\n".encode("utf-16"), "UTF-16"),
        ("ä,b\n".encode("latin-1"), "UTF-8"),
    ],
)
def test_a_table_without_a_header_is_told(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "d.csv").write_bytes(content)
    with pytest.raises(InputError, match=problem):
        list(iter_numbered_rows(tmp_path / "d.csv"))


@pytest.mark.parametrize("content", ["prompt;completion\nGeöffnet?;Ja\n", "Prämisse;completion\nOffen?;Ja\n"])
def test_another_encoding_has_a_remedy_of_its_own(tmp_path: Path, content: str) -> None:
    (tmp_path / "d.csv").write_bytes(content.encode("cp1252"))
    with pytest.raises(InputError, match="not text in UTF-8") as caught:
        list(iter_valid_rows(tmp_path / "d.csv"))
    assert "iconv -f WINDOWS-1252 -t UTF-8" in caught.value.remedy


@pytest.mark.parametrize("header", ['"Prompt";"Completion";"Notes, internal"', "Prompt;Completion;Notes, internal"])
def test_a_separator_within_a_name_separates_nothing(tmp_path: Path, header: str) -> None:
    (tmp_path / "d.csv").write_text(f"{header}\nHi;Ho;x\n")
    assert [*iter_numbered_rows(tmp_path / "d.csv")] == [
        (1, {"Prompt": "Hi", "Completion": "Ho", "Notes, internal": "x"})
    ]


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow", "s.arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    table = pa.table([pa.array(["Q"]), pa.array(["A"]), pa.array(["B"])], names=["prompt", "answer", "answer"])
    path = tmp_path / name
    if name == "d.parquet":
        pq.write_table(table, path)
    else:
        with (pa.ipc.new_file if name == "d.arrow" else pa.ipc.new_stream)(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(InputError, match="several columns called answer"):
        list(iter_numbered_rows(path))


def test_a_header_alone_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("a,b\n")
    assert list(iter_numbered_rows(tmp_path / "d.csv")) == []


@pytest.mark.parametrize("name", COLUMNS)
def test_nul_in_a_column_is_told(tmp_path: Path, name: str) -> None:
    bad = [{"text": "a\0"}, {"text": None}, {"text": "a"}]
    path = write_row_file(tmp_path, name, [{"text": "a"}, *bad])
    all_rows = list(iter_rows(path))
    assert [row.error.problem if row.error else row.data["text"] for row in all_rows] == [
        "a",
        "it holds U+0000 (NUL), which is no character of a text",
        None,
        "a",
    ]
    path = write_row_file(tmp_path, name, [{"m": [{"content": "a"}]}, {"m": [{"content": "a"}, {"content": "b\0"}]}])
    first, second = iter_rows(path)
    assert first.error is None
    assert second.error is not None
    assert second.error.field == f"{path}, row 2, m[1].content"


def test_a_row_that_is_wrong_ends_what_takes_none(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(GOOD + b"{\n" + GOOD)
    valid_rows = iter_valid_rows(tmp_path / "d.jsonl")
    assert next(valid_rows).data == {"text": "a"}
    with pytest.raises(InputError, match="row 2"):
        next(valid_rows)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_a_value_may_lie_across_what_is_read_at_a_time(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.data.read.json_rows.CHUNK_BYTES", size)
    path = tmp_path / "d.json"
    for name in ("array.json", "indented.json", "held.json"):
        assert list(iter_numbered_rows(write_row_file(tmp_path, name, NESTED).rename(path))) == number_rows(NESTED)
    path.write_text('{"version": 12345, "ok": true, "n": [12345, -1.5e10], "data": [{"a": 67890}, {"é": null}]}')
    assert list(iter_numbered_rows(path)) == number_rows([{"a": 67890}, {"é": None}])
    path.write_text('[{"a": 1}, 1234567, {"a": 2}]')
    first, middle, last = iter_numbered_rows(path)
    assert isinstance(middle[1], InputError)
    assert (middle[1].value, first[1], last[1]) == ("1234567", {"a": 1}, {"a": 2})


any_text = st.text(st.characters(exclude_characters="\0", codec="utf-8"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('abcäß"\\', max_size=3), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=80, suppress_health_check=list(HealthCheck))
@given(st.lists(st.dictionaries(st.text("abcö", min_size=1), json_values, min_size=1), min_size=1), st.integers(0, 3))
def test_any_json_is_read_alike_however_it_is_laid_out(found: list[dict[str, Any]], indent: int) -> None:
    folder = Path(tempfile.mkdtemp())
    for name in ("d.jsonl", "held.json"):
        assert [data for _, data in iter_numbered_rows(write_row_file(folder, name, found))] == found
    (folder / "array.json").write_text(json.dumps(found, indent=indent or None, ensure_ascii=bool(indent)))
    assert [data for _, data in iter_numbered_rows(folder / "array.json")] == found


cells = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=20)


@settings(max_examples=80, suppress_health_check=list(HealthCheck))
@given(st.lists(st.fixed_dictionaries({"a": cells, "b": cells | st.none()}), min_size=1), st.sampled_from(TABLES))
def test_any_text_comes_back_from_a_table(found: list[dict[str, Any]], name: str) -> None:
    path = write_row_file(Path(tempfile.mkdtemp()), name, found)
    assert [data for _, data in iter_numbered_rows(path)] == found


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"])
def test_the_share_that_is_read_grows_with_the_rows(tmp_path: Path, name: str) -> None:
    """Two files are read one after the other; the share counts their bytes on disk."""
    rng = random.Random(0)
    records = list[dict[str, str]]()
    for i in range(20_000):
        records.append({"text": f"{i} {rng.getrandbits(400):x}"})
    for i in (0, 1):
        path = tmp_path / f"{i}-{name}"
        if name.endswith("parquet"):
            pq.write_table(pa.Table.from_pylist(records), path, row_group_size=1000)
        else:
            packer = {"gz": gzip.compress, "zst": lambda text: pa.compress(text, "zstd", asbytes=True)}
            lines = "".join(json.dumps(row) + "\n" for row in records).encode()
            path.write_bytes(packer.get(name.rpartition(".")[2], bytes)(lines))
    files = sorted(tmp_path.iterdir())
    assert compute_read_share(files) is None
    shares = [compute_read_share(files) for i, _ in enumerate(iter_rows(tmp_path), start=1) if i % 2000 == 0]
    assert shares[:-1] == pytest.approx([i / 20 for i in range(1, 20)], abs=0.06)
    assert compute_read_share(files) is None


def test_a_file_that_is_opened_again_while_it_is_read_is_still_being_read(tmp_path: Path) -> None:
    """The file is opened again to look at the rows before the one where reading starts."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 10)
    with DataFile(path).open_stream() as file:
        file.read(45)
        with DataFile(path).open_stream() as second_file:
            second_file.read(9)
            assert compute_read_share([path]) == 0.5
        assert compute_read_share([path]) == 0.5
    assert compute_read_share([path]) is None
