"""Sizes in bytes, to and from text, and in whole pages. Knows no other unit."""

import re

PAGE = 4096  # what reads past the page cache are made of, in offset, length and address

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for base, suffixes in ((1000, ("b",)), (1024, ("ib", "")))
    for suffix in suffixes
    for power, prefix in enumerate("kmgt", start=1)
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def whole_pages(nbytes: int) -> int:
    """At least `nbytes`, in whole pages."""
    return -(-nbytes // PAGE) * PAGE


def parse_size(size: str | int) -> int:
    """Bytes of `"600MiB"`, `"1.5 GB"`, `"2G"` (= GiB) or plain bytes. Raises ValueError on anything else."""
    if isinstance(size, int):
        return size
    match = _SIZE.fullmatch(size)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"size {size!r} is not a number with a unit: write it like 600MiB, 1.5GB or 800000000")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_size(size: float) -> str:
    """`"612 MiB"`: three significant digits, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 100 else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
