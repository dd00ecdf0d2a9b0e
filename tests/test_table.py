"""Tables as text, and the tables in Markdown files."""

import json
from pathlib import Path
from typing import Any

import pytest

from zsq.core import RecipeError, RunError
from zsq.rows import write_rows
from zsq.table import brief, markdown, select, tables, updated

ROOT = Path(__file__).parent.parent


def row(method: str, bits: str, top1: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A row on a network of 90 % by itself, with 10 seconds and 100 MB for each seed from 1 on."""
    facts: dict[str, Any] = {
        "cell": f"net/{method}/{bits}/{seed}/{more}",
        "status": "done",
        "model": "zoo:net",
        "method": method,
        "preset": "paper",
        "bits": bits,
        "protocol": "minmax-ptq",
        "effort": "fast",
        "seed": seed,
        "source": "own",
        "data": "test.zip",
        "accuracy": {
            "float": {"top1": 90.0, "images": 1000},
            "quantized": {"top1": top1, "images": 1000},
            "drop": 90.0 - top1,
        },
        "seconds": {"synthesize": 6.0 * (seed + 1), "calibrate": 4.0 * (seed + 1), "estimate": 50.0, "evaluate": 99.0},
        "peak_memory_mb": 1000 + 100 * seed,
        "machine": {"processor": "Abacus", "cores": 2, "threads": 1},
        "command": "zsq compare zoo:net",
    }
    return {**facts, **more}


FLOAT = {
    "cell": "net/float",
    "status": "done",
    "model": "zoo:net",
    "method": "float",
    "bits": "w32a32",
    "source": "own",
    "data": "test.zip",
    "accuracy": {"float": {"top1": 90.0, "images": 1000}},
}
ROWS = [
    FLOAT,
    row("nearest", "W4A4", 70.0),
    row("nearest", "W8A8", 89.5),
    *(row("zeroq", "W4A4", top1, seed) for seed, top1 in enumerate((79.0, 80.0, 81.0))),
    row("zeroq", "W4A4", 85.0, source="real"),
    row("zeroq", "W8A8", 0.0, status="failed", reason="the loss is not finite at step 3"),
    row("squant", "W8A8", 88.0, preset="a8", no_real="makes no images"),
]
TEXT = """\
`zoo:net` under `minmax-ptq`, effort fast, 1,000 images of test.zip:

| method | W8A8 | W4A4 | seconds | MB |
|---|--:|--:|--:|--:|
| float | 90.00 | 90.00 |  |  |
| `nearest` | 89.50 (0.50) | 70.00 (20.00) | 10.0 | 1,000 |
| `zeroq` | - | 80.00 ± 1.00 (10.00; n = 3) | 20.0 | 1,200 |
| `zeroq`, real images | - | 85.00 (5.00) | 10.0 | 1,000 |
| `squant:a8` | 88.00 (2.00) | - | 10.0 | 1,000 |

Top-1 in percent, behind it the drop in points; ± is the standard deviation over n seeds.

Failed: `zeroq` W8A8, seed 0: the loss is not finite at step 3.

No control on real images for `squant:a8` (makes no images).

By `zsq compare zoo:net --out DIR` on Abacus, 1 thread."""
BRIEF = """\
`zoo:net`, effort fast, 1,000 images of test.zip:

| protocol | method | W8A8 | W4A4 | W2A2 |
|---|---|--:|--:|--:|
|  | float | 90.00 | 90.00 | 90.00 |
| `minmax-ptq` | `nearest` | 89.50 (0.50) | 70.00 (20.00) | - |
|  | `zeroq` | - | 80.00 ± 1.00 (10.00; n = 3) | - |
|  | `zeroq`, real images | - | 85.00 (5.00) | - |
|  | `squant:a8` | 88.00 (2.00) | - | - |
| `other` | `zeroq` | - | 50.00 (40.00) | 40.00 (50.00) |

Top-1 in percent, behind it the drop in points; ± is the standard deviation over n seeds.

Failed: `zeroq` W8A8, seed 0: the loss is not finite at step 3."""


def test_a_table_as_text():
    # zeroq: the mean of 79, 80, 81 is 80, their standard deviation sqrt((1 + 0 + 1) / 2) = 1; 10, 20, 30 seconds
    assert markdown(tables(ROWS)) == TEXT


def test_brief_tables_join_protocols_and_still_say_what_failed():
    others = [row("zeroq", "W4A4", 50.0, protocol="other"), row("zeroq", "W2A2", 40.0, protocol="other")]
    assert brief(tables([*ROWS, *others])) == BRIEF
    assert len(brief(tables([*ROWS, row("zeroq", "W4A4", 50.0, effort="paper")])).split("`zoo:net`, effort")) == 3


def test_the_control_comes_first_and_real_images_behind_their_method():
    assert brief(tables(ROWS[:1] + ROWS[:0:-1])).splitlines()[5:9] == [
        "| `minmax-ptq` | `nearest` | 89.50 (0.50) | 70.00 (20.00) |",
        "|  | `squant:a8` | 88.00 (2.00) | - |",
        "|  | `zeroq` | - | 80.00 ± 1.00 (10.00; n = 3) |",
        "|  | `zeroq`, real images | - | 85.00 (5.00) |",
    ]


def test_a_cell_that_two_files_have_counts_once():
    assert markdown(tables([*ROWS, *ROWS])) == TEXT
    other = [{**each, "recipe": "another"} for each in ROWS]
    assert "n = 6" in markdown(tables([*ROWS, *other]))


def test_conditions_that_differ_never_share_a_table():
    others = [row("zeroq", "W4A4", 50.0, **{name: "other"}) for name in ("model", "protocol", "effort", "data")]
    made = tables([*ROWS, *others])
    assert len(made) == 5
    assert markdown(made[:1]) == TEXT


def test_rows_can_be_chosen_and_float_always_stays():
    chosen = select(ROWS, ["method=zeroq,SQuant", "source=own", "seed=0"])
    assert [each["method"] for each in chosen] == ["float", "zeroq", "zeroq", "squant"]
    with pytest.raises(RecipeError, match=r"--only seeds=0: write KEY=VALUE,VALUE with one of .*seed, "):
        select(ROWS, ["seeds=0"])


def test_published_drops_stand_below_ours_with_their_sources():
    model = {"model": "zoo:resnet20-cifar10", "protocol": "qat-lowbit-all"}
    rows = [row("hast", bits, 85.0, **model) for bits in ("W4A4", "W3A3", "W2A2")]
    shown = markdown(tables([*rows, row("hast", "W4A4", 86.0, source="real", **model)])).splitlines()
    assert shown[5:8] == [
        "| `hast` | 85.00 (5.00) | 85.00 (5.00) | 85.00 (5.00) | 10.0 | 1,000 |",
        "| `hast`, published | (1.53 to 1.67) [1, 2] | (5.69 to 7.55) [2, 1] | - |  |  |",
        "| `hast`, real images | 86.00 (4.00) | - | - | 10.0 | 1,000 |",
    ]
    assert (
        "Published drops under this protocol: [1] SynQ (ICLR 2025) Table 1; [2] PLF (CVPR 2024) Table 1. "
        "Float networks and effort differ."
    ) in shown
    assert "published" not in markdown(tables([{**each, "protocol": "ptq-8bit-ends"} for each in rows]))


def test_no_rows_make_no_table():
    assert tables([]) == []
    assert markdown(tables([FLOAT])) == ""


# --- in Markdown files ------------------------------------------------------------------------------------------

PAGE = """\
# A page

<!-- zsq table results/all.jsonl --only bits=W8A8 -->
stale
<!-- end -->

Text between, <!-- a comment -->.

```text
<!-- zsq table results/all.jsonl -->
an example stays
<!-- end -->
```

<!-- zsq table results/all.jsonl -->
<!-- end -->
"""


def test_what_stands_between_the_marks_is_made_anew(tmp_path):
    (tmp_path / "docs").mkdir()
    write_rows(tmp_path / "results" / "all.jsonl", ROWS)
    page = tmp_path / "docs" / "page.md"
    page.write_text(PAGE)
    text = updated(page)
    assert text.startswith("# A page\n\n<!-- zsq table results/all.jsonl --only bits=W8A8 -->\n\n`zoo:net` under")
    assert f"<!-- zsq table results/all.jsonl -->\n\n{TEXT}\n\n<!-- end -->\n" in text
    assert "stale" not in text
    assert "```text\n<!-- zsq table results/all.jsonl -->\nan example stays\n<!-- end -->\n```\n" in text
    assert "\n\n<!-- end -->\n\nText between, <!-- a comment -->.\n\n```" in text
    page.write_text(text)
    assert updated(page) == text


def test_a_mark_may_ask_for_a_brief_table(tmp_path):
    write_rows(tmp_path / "all.jsonl", ROWS)
    (tmp_path / "page.md").write_text("<!-- zsq table all.jsonl --brief -->\n<!-- end -->\n")
    assert f"\n\n{brief(tables(ROWS))}\n\n" in updated(tmp_path / "page.md")


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        ("gone.jsonl", RunError, "names gone.jsonl, which is neither"),
        ("all.jsonl --only method=genie", RecipeError, "no rows for"),
        ("all.jsonl --only genie", RecipeError, "write KEY=VALUE"),
    ],
)
def test_marks_that_name_nothing_are_refused(tmp_path, words, error, says):
    write_rows(tmp_path / "all.jsonl", ROWS)
    (tmp_path / "page.md").write_text(f"<!-- zsq table {words} -->\n<!-- end -->\n")
    with pytest.raises(error, match=says):
        updated(tmp_path / "page.md")


PAGES = sorted(
    path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")) if "<!-- zsq table " in path.read_text()
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_tables_of_the_repository_are_fresh(page):
    assert page.read_text() == updated(page), f"run zsq table --update {page.relative_to(ROOT)}"


def test_committed_rows_name_no_folder_of_a_machine():
    for path in (ROOT / "results").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            strings = [text for text in json.loads(line).values() if isinstance(text, str)]
            assert not [text for text in strings if text.startswith(("/", "~"))], path
