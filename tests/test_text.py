"""How figures look on a terminal."""

from __future__ import annotations

import pytest

from pocketllm import text


@pytest.mark.parametrize(
    "count, shown",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (15_737_344, "15.7 MB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (83_500, "83.5 kB"),
        (7_000_000_000_000_000, "7000 TB"),
    ],
)
def test_size(count: int, shown: str) -> None:
    assert text.size(count) == shown


@pytest.mark.parametrize(
    "seconds, shown",
    [(0.2, "1 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds: float, shown: str) -> None:
    assert text.duration(seconds) == shown


def test_table_sets_figures_flush_right() -> None:
    shown = text.table(("name", "bytes"), [("a", "7"), ("long name", "1,234")])
    assert shown.splitlines() == [
        "name       bytes",
        "---------  -----",
        "a              7",
        "long name  1,234",
    ]
    assert text.table(("name", "bytes"), []).splitlines() == ["name  bytes", "----  -----"]


def test_facts() -> None:
    assert text.facts([("size", "3 MB"), ("", "more")]) == "size  3 MB\n      more"
    assert text.facts([]) == ""
