"""Rows in a file, whatever happened to it."""

import json

import pytest

from zsq.core import RunError
from zsq.rows import FILE, read_rows, write_rows

ROWS = [{"cell": name, "n": number} for number, name in enumerate("abc")]


def test_rows_come_back_in_the_order_asked_for_behind_strangers(tmp_path):
    write_rows(tmp_path / FILE, ROWS, ["c", "b"])
    assert [row["cell"] for row in read_rows(tmp_path)] == ["a", "c", "b"]
    assert read_rows(tmp_path) == read_rows(tmp_path / FILE)


def test_of_two_rows_for_a_cell_the_later_counts(tmp_path):
    (tmp_path / FILE).write_text("".join(json.dumps(row) + "\n" for row in (*ROWS, {"cell": "a", "n": 7})))
    assert {row["cell"]: row["n"] for row in read_rows(tmp_path)} == {"a": 7, "b": 1, "c": 2}


def test_a_torn_last_line_is_left_out_at_any_byte(tmp_path):
    write_rows(tmp_path / FILE, ROWS)
    content = (tmp_path / FILE).read_bytes()
    for length in range(len(content)):
        (tmp_path / FILE).write_bytes(content[:length])
        complete = content[:length].count(b"}")  # a line may lack its end and be whole
        assert read_rows(tmp_path) == ROWS[:complete]


@pytest.mark.parametrize(
    ("text", "says"),
    [('{"cell": \n{"cell": "a"}\n', "line 1"), ('{"cell": "a"}\n{"n": 1}\n', "line 2"), ("[1]\n", "line 1")],
)
def test_a_line_that_is_no_row_is_named(tmp_path, text, says):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RunError, match=f"{says} of .* is no row"):
        read_rows(tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match=r"nowhere\.jsonl cannot be read"):
        read_rows(tmp_path / "nowhere.jsonl")
