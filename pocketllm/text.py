"""How figures look on a terminal: sizes, durations, tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def size(count: int) -> str:
    """Bytes in decimal units: ``15.7 MB``."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    digits = 0 if unit == "B" or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """Rounded for reading: ``45 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def times(larger: float, smaller: float) -> str:
    """How many times one number is the other: ``5.3x``."""
    return f"{larger / smaller:.2f}x" if smaller else "-"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; those that hold figures are set flush right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [
        len(lines) > 1 and all(cell[:1].isdigit() or cell == "-" for cell in column[1:])
        for column in zip(*lines, strict=True)
    ]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """One line for each label and value, the values below each other."""
    lines = list(pairs)
    width = max((len(label) for label, _ in lines), default=0)
    return "\n".join(f"{label:<{width}}  {value}".rstrip() for label, value in lines)
