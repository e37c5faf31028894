"""Documents of paragraphs, lists, tables and pictures, as Markdown and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Columns and rows of text; the first column is the row's name."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG with the file name that it has beside the Markdown, and what it shows."""

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class Fold:
    """Text to look up: commands, versions, tracebacks."""

    title: str
    text: str


Block = str | list[str] | Table | Picture | Fold
"""A paragraph, a list, or one of the above."""


@dataclass
class Page:
    """A document: sections of blocks under headings of a level."""

    title: str
    sections: list[tuple[int, str, list[Block]]] = field(default_factory=list)

    def section(self, level: int, heading: str) -> list[Block]:
        """Begin a section; returns its blocks, to be filled."""
        self.sections.append((level, heading, []))
        return self.sections[-1][2]

    def markdown(self) -> str:
        """The document as Markdown; pictures are links to files beside it."""
        lines = [f"# {self.title}", ""]
        for level, heading, blocks in self.sections:
            lines += [f"{'#' * level} {heading}", ""]
            for block in blocks:
                lines += [*_markdown(block), ""]
        return "\n".join(lines)

    def html(self) -> str:
        """The document as one HTML page with its pictures inside."""
        title, body = html.escape(self.title), []
        contents = []
        for number, (level, heading, blocks) in enumerate(self.sections):
            name = html.escape(heading)
            body.append(f'<h{level} id="s{number}">{name}</h{level}>')
            if level == 2:
                contents.append(f'<a href="#s{number}">{name}</a>')
            body += [_html(block) for block in blocks]
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
            f"<body><h1>{title}</h1>\n<nav>{' '.join(contents)}</nav>\n" + "\n".join(body) + "\n</body></html>\n"
        )


STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;max-width:76rem;margin:2rem auto;padding:0 1.5rem}
h1{font-size:1.9rem;margin:0 0 .5rem}h2{border-bottom:2px solid #0072B2;padding-bottom:.2rem;margin-top:3rem}
h3{margin:2rem 0 .5rem}nav a{margin-right:1.2rem;color:#0072B2}p,ul{max-width:60rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;margin:.8rem 0}
th{text-align:right;background:#f3f4f6;border-bottom:2px solid #9ca3af;padding:.35rem .7rem;vertical-align:bottom}
td{text-align:right;padding:.3rem .7rem;border-bottom:1px solid #e5e7eb;white-space:nowrap}
th:first-child,td:first-child{text-align:left;font-weight:600}tbody tr:hover{background:#f9fafb}
figure{margin:1.2rem 0}figure img{max-width:100%;height:auto}figcaption{color:#4b5563;font-size:.9rem;max-width:60rem}
details{margin:.6rem 0}summary{cursor:pointer;color:#0072B2}
pre{background:#f3f4f6;padding:.8rem;overflow-x:auto;font-size:.82rem;line-height:1.4}
"""


def _markdown(block: Block) -> list[str]:
    if isinstance(block, str):
        return [block]
    if isinstance(block, list):
        return [f"- {item}" for item in block]
    if isinstance(block, Picture):
        return [f"![{block.caption}]({block.name})", "", f"*{block.caption}*"]
    if isinstance(block, Fold):
        return [f"**{block.title}**", "", *(f"    {line}" for line in block.text.splitlines())]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (block.columns, *block.rows)]
    ruler = ["---", *["---:"] * (len(block.columns) - 1)]
    return [f"| {' | '.join(row)} |" for row in (rows[0], ruler, *rows[1:])]


def _html(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{html.escape(block)}</p>"
    if isinstance(block, list):
        return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in block) + "</ul>"
    if isinstance(block, Picture):
        data, caption = base64.b64encode(block.png).decode(), html.escape(block.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    if isinstance(block, Fold):
        return f"<details><summary>{html.escape(block.title)}</summary><pre>{html.escape(block.text)}</pre></details>"
    head, *rows = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in (("th", block.columns), *(("td", row) for row in block.rows))
    ]
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def cell(value: Mapping[str, float], digits: int = 3) -> str:
    """A value with its interval."""
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
