"""A page of headings, paragraphs, lists, tables and plots, as Markdown or as one HTML file. Knows no figures.

The HTML loads nothing: no script, no image, no font; its plots are SVG in the text. Markdown leaves plots out.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1f2328;background:#fff}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
th,td{border:1px solid #d0d7de;padding:.25rem .6rem;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}
th{background:#f3f5f7} code,pre{font-family:ui-monospace,monospace;overflow-wrap:anywhere;white-space:pre-wrap}
svg{max-width:100%;height:auto;margin:.5rem 0}
@media(prefers-color-scheme:dark){body{color:#e6e9ec;background:#16191d}th{background:#22272e}th,td{border-color:#3a424b}}
"""
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?(%|s|[KMGT]?i?B))?")


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    svg: str


Block = Heading | Paragraph | Code | Bullets | Table | Plot


def markdown(title: str, blocks: Iterable[Block]) -> str:
    """The page as Markdown, its plots left out."""
    parts = [f"# {_plain(title)}"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {_plain(text)}")
            case Paragraph(text):
                parts.append(_plain(text))
            case Code(text):
                parts.append("\n".join(f"    {line}" for line in text.splitlines()))
            case Bullets(items):
                parts.append("\n".join(f"- {_plain(item)}" for item in items))
            case Table():
                parts.append(table_text(block))
            case Plot():
                pass
    return "\n\n".join(part for part in parts if part) + "\n"


def table_text(table: Table) -> str:
    """A table as Markdown, without an end of line."""
    rows = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join("| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def _plain(text: str) -> str:
    """One line in which nothing is markup: names come from files and users."""
    text = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>])", r"\\\1", text)


def html(title: str, blocks: Iterable[Block]) -> str:
    """The page as one HTML file."""
    body = "\n".join(_block_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _block_html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Code(text):
            return f"<pre>{escape(text)}</pre>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"
        case Plot(svg):
            return svg
        case Table(head, rows):
            top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
            lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
            return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


def _cell(text: str) -> str:
    kind = ' class="n"' if _NUMBER.fullmatch(text) else ""
    return f"<td{kind}>{escape(text)}</td>"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: under a temporary name, on the disk, then renamed."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
