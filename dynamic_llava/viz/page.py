"""Pages that stand alone: one file of HTML that asks nothing of any network and runs no script.

Every text comes in by `escaped`; pictures are in the file. Colours follow the reader's dark or light setting, and
everything fits into 400 pixels.
"""

import base64
import re
import struct
import unicodedata
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_BOLD = re.compile(r"\*\*(.+?)\*\*")
_BAR = re.compile(r"(?<!\\)\|")


def escaped(text: object) -> str:
    """Return any text for a page: no tag, no end of an attribute, no control character, no mark that turns lines."""
    whole = str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # halves of escaped pairs
    return escape("".join(map(_harmless, whole.replace("\r\n", "\n"))), quote=True)


def _harmless(character: str) -> str:
    if character in "\n\t":
        return character
    turns = unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return "\ufffd" if turns or unicodedata.category(character) == "Cc" else character


def document(title: str, body: Iterable[str]) -> str:
    """Return a whole page; `title` is plain text, the body HTML."""
    css = resources.files("dynamic_llava.viz").joinpath("page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            # The page asks for nothing, and this holds even if a text were not escaped.
            """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; """
            """style-src 'unsafe-inline'">""",
            f"<title>{escaped(title)}</title>",
            f"<style>\n{css}</style></head><body><main>",
            *body,
            "</main></body></html>\n",
        ]
    )


def section(title: str, parts: Iterable[str]) -> list[str]:
    """Return HTML under a heading; nothing at all where there are no parts."""
    inside = list(parts)
    return [f"<section><h2>{escaped(title)}</h2>", *inside, "</section>"] if inside else []


def folded(title: str, parts: Iterable[str]) -> list[str]:
    """Return HTML that a reader opens; nothing at all where there are no parts."""
    inside = list(parts)
    return [f"<details><summary>{escaped(title)}</summary>", *inside, "</details>"] if inside else []


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of plain text; `kind` is a class of page.css."""
    return f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escaped(text)}</p>"


def figure(png: bytes, alt: str, caption: str, more: str = "") -> str:
    """Return a picture in the page with its caption, plain text, and HTML behind that; ValueError for no whole PNG."""
    if not png.startswith(_PNG) or len(png) < 24 or not png.endswith(_PNG_END):
        raise ValueError("it is no whole PNG file")
    width, height = struct.unpack(">II", png[16:24])
    data = base64.b64encode(png).decode("ascii")
    picture = f'<img alt="{escaped(alt)}" width="{width}" height="{height}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{escaped(caption)} {more}</figcaption></figure>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, texts: bool = False) -> str:
    """Return a table of plain texts, each row named by its first cell; wide ones scroll.

    Numbers are flush right, `texts` flush left.
    """
    sides = [place > 0 and not texts for place in range(len(head))]
    return _table([escaped(cell) for cell in head], [[escaped(cell) for cell in row] for row in rows], sides)


def facts(pairs: Iterable[tuple[str, object]]) -> list[str]:
    """Return names and what they are, plain texts, as a table of two columns; nothing without a pair."""
    rows = [f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(value)}</td></tr>' for name, value in pairs]
    return [f'<div class="wide"><table class="facts"><tbody>{"".join(rows)}</tbody></table></div>'] if rows else []


def from_markdown(text: str) -> list[str]:
    """Return a page of ours as HTML: headings, tables, lists, paragraphs, code and bold; all other marks stay text.

    Its first heading and its pictures are left out: the page around it has its own.
    """
    out: list[str] = []
    for block in re.split(r"\n[ \t]*\n", text.strip()):
        out += _block(block.strip("\n").split("\n"))
    while out and out[-1].startswith("<h"):  # with nothing below it: the text was cut off
        out.pop()
    return out


def _block(lines: Sequence[str]) -> list[str]:
    first = lines[0]
    marks = re.match(r"(#+) ", first)
    if marks:
        level = min(len(marks[1]) + 1, 4)
        heading = [] if level == 2 else [f"<h{level}>{_inline(first[marks.end() :])}</h{level}>"]
        return [*heading, *(_block(lines[1:]) if lines[1:] else [])]
    if first.startswith("![") or not first.strip():
        return []
    if first.startswith("|") and len(lines) > 1:
        head, marked, *rows = [_cells(line) for line in lines]
        return [_table(head, rows, [cell.endswith(":") for cell in marked])] if rows else []
    if first.startswith("- "):
        points = "\n".join(lines)[2:].split("\n- ")
        return [f"<ul>{''.join(f'<li>{_inline(point)}</li>' for point in points)}</ul>"]
    return [f"<p>{_inline(' '.join(lines))}</p>"]


def _cells(line: str) -> list[str]:
    cells = _BAR.split(line.strip())
    return [_inline(cell.strip().replace(r"\|", "|")) for cell in cells[1 : len(cells) - (not cells[-1].strip())]]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[bool]) -> str:
    """Return a table of HTML cells; `right`: which columns are flush right."""

    def cell(place: int, inside: str) -> str:
        side = "" if place < len(right) and right[place] else ' class="left"'
        return f"<td{side}>{inside}</td>" if place else f'<th scope="row">{inside}</th>'

    names = "".join(f'<th scope="col">{name}</th>' for name in head)
    lines = "".join(f"<tr>{''.join(cell(place, inside) for place, inside in enumerate(row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>'


def _inline(text: str) -> str:
    out, place = [], 0
    for found in _CODE.finditer(text):
        out += [
            _BOLD.sub(r"<b>\1</b>", escaped(text[place : found.start()])),
            f"<code>{escaped(found[2].strip())}</code>",
        ]
        place = found.end()
    return "".join(out) + _BOLD.sub(r"<b>\1</b>", escaped(text[place:]))
