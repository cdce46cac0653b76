"""Content -> one HTML file that asks for nothing: style, script, pictures and numbers stand in it.

page.html is the template (every text in it is escaped by `_shown`), page.css the look, page.js the sorting, filtering
and the panel of runs. Without JavaScript the page is static tables and pictures.

The runs and the tables' LaTeX and CSV are JSON, deflated, in base64: they are unpacked when first asked for, no name in
them can be markup, and 10,000 runs take a fraction of their text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from results.escape import cut, one_line, visible
from results.figures.drawing import Drawing
from results.report.content import Content
from results.tables.csv import to_csv
from results.tables.html import escape_html, html_table, short_caption
from results.tables.latex import to_latex
from results.tables.marked import LONGEST_SENTENCE
from results.tables.stems import file_stem
from results.tables.table import Table

if TYPE_CHECKING:
    from markupsafe import Markup

MOST_CELLS = 25_000
"""Cells of all tables that a page shows; a table that would pass it is cut after some rows and says so, and its LaTeX
and CSV are left to files."""
MOST_MARKS = 200
"""Rows of a figure's numbers; a longer list is cut, and says so."""
ICON = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'><rect width='16' height='16' rx='3' fill='#0072B2'/>"
    "<path d='M2 13C6 13 6 3 8 3s2 10 6 10' fill='none' stroke='#fff' stroke-width='1.6'/></svg>"
)


@dataclass(frozen=True)
class _TableView:
    """A table as it stands in the page: `table` and `notes` are HTML; `rest` the caption's further sentences, `texts`
    its LaTeX and CSV, none where it is cut; `label` tells the tables of a page apart."""

    id: str
    title: str
    label: str
    table: Markup
    notes: list[Markup]
    rest: list[str]
    cut: str
    tall: bool
    texts: list[str]


@dataclass(frozen=True)
class _FigureView:
    """A figure as it stands in the page: `svg` is HTML, `width` its points, `heads` and `rows` its numbers."""

    id: str
    title: str
    alt: str
    svg: Markup
    width: float
    caption: tuple[str, ...]
    heads: list[str]
    rows: list[list[str]]
    cut: str


@dataclass(frozen=True)
class _Section:
    id: str
    title: str
    tables: list[_TableView]
    figures: list[_FigureView]


def page(content: Content) -> str:
    """The report as one HTML file, UTF-8.

    Its numbers are those of `content`; rows of tables and of figures' numbers beyond MOST_CELLS and MOST_MARKS are left
    out and counted there.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style, script, template = (_part(f"page.{kind}") for kind in ("css", "js", "html"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["lines"] = lambda text: Markup(html.escape(visible_lines(text)))
    anchors = dict(zip((c.label for c in content.cards), _ids("norm", (c.label for c in content.cards)), strict=True))
    # a row that stands for several options of a norm leads to the first of its cards
    links = {card.norm: f"#{anchors[card.label]}" for card in reversed(content.cards)}
    headline, sections = _sections(content, links | {label: f"#{anchor}" for label, anchor in anchors.items()})
    views = [*([headline] if headline else []), *(view for section in sections for view in section.tables)]
    return environment.from_string(template).render(
        content=content,
        policy=f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        icon="data:image/svg+xml;base64," + base64.b64encode(ICON.encode()).decode(),
        style=Markup(style),
        script=Markup(script),
        anchors=anchors,
        headline=headline,
        sections=sections,
        runs=packed(content.runs),
        texts=packed({view.id: view.texts for view in views if view.texts}),
    )


def packed(value: Any) -> str:
    """JSON of a value, deflated, in base64; texts are made visible, numbers that JSON has no word for are null."""
    text = json.dumps(_plain(value), separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def unpacked(text: str) -> Any:
    """What `packed` packed: to read a page's numbers back."""
    return json.loads(zlib.decompress(base64.b64decode(text)))


def visible_lines(text: str) -> str:
    """A text of several lines whose other control characters, and those that turn its direction, are U+XXXX; a space
    that breaks no line is a space."""
    return "\n".join(
        visible(line.replace("\t", "    ").replace("\u00a0", " ")) for line in re.split("\r\n|[\r\n]", text)
    )


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() and value.isprintable() else visible_lines(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {one_line(str(name)): _plain(entry) for name, entry in value.items()}
    if isinstance(value, Iterable):
        return [_plain(entry) for entry in value]
    return value


def _shown(value: Any) -> Any:
    """What the template prints: a text on one line with nothing unseen in it; HTML of ours as it is."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return cut(one_line(value), LONGEST_SENTENCE) if not value.isascii() or not value.isprintable() else value
    return value


def _part(name: str) -> str:
    return resources.files("results.report").joinpath(name).read_text(encoding="utf-8")


def _ids(kind: str, names: Iterable[str]) -> list[str]:
    """An id per name, of letters that need no escaping in an address; the second of equal ones has a number."""
    taken: set[str] = set()
    found = []
    for name in names:
        stem = anchor = f"{kind}-{re.sub('[^A-Za-z0-9_.]+', '-', name).strip('-')[:80] or 'x'}"
        number = 1
        while anchor.casefold() in taken:
            number += 1
            anchor = f"{stem}-{number}"
        taken.add(anchor.casefold())
        found.append(anchor)
    return found


def _in_sections(tables: Sequence[Table]) -> list[Table]:
    """The tables in the order of sections: a task's stand together, those about several tasks last."""
    tasks = list(dict.fromkeys(table.task for table in tables if table.task))
    return [table for task in [*tasks, ""] for table in tables if table.task == task]


def _sections(content: Content, links: Mapping[str, str]) -> tuple[_TableView | None, list[_Section]]:
    """The headline table, and a section per task, then one for what is about several."""
    ordered = _in_sections(content.tables)
    whole = [*([content.headline] if content.headline else []), *ordered]
    names = _ids("table", (table.name for table in whole))
    rows = _rows_shown(whole)
    runs = _numbered(content.runs)
    views = [_table(table, name, links, runs, most) for table, name, most in zip(whole, names, rows, strict=True)]
    headline = views.pop(0) if content.headline else None
    ids = _ids("figure", (drawing.name for drawing in content.drawings))
    figures = [_figure(d, name, f"f{place}") for place, (d, name) in enumerate(zip(content.drawings, ids, strict=True))]
    tasks = [task for task in dict.fromkeys([*(t.task for t in ordered), *(d.task for d in content.drawings)]) if task]
    titles = [*tasks, "Over all tasks"]
    sections = [
        _Section(
            anchor,
            title,
            [view for view, table in zip(views, ordered, strict=True) if table.task == task],
            [view for view, drawing in zip(figures, content.drawings, strict=True) if drawing.task == task],
        )
        for anchor, title, task in zip(_ids("section", titles), titles, [*tasks, ""], strict=True)
    ]
    return headline, [section for section in sections if section.tables or section.figures]


def _rows_shown(tables: Sequence[Table]) -> list[int]:
    """Rows of each table that the page shows: all, or of the longest tables so many that MOST_CELLS hold."""
    cells = [len(table.rows) * len(table.columns) for table in tables]
    most = MOST_CELLS
    for done, count in enumerate(sorted(cells)):  # what short tables leave of their share goes to the longer ones
        share = most // (len(cells) - done)
        if count > share:
            return [min(len(t.rows), max(1, share // max(1, len(t.columns)))) for t in tables]
        most -= count
    return [len(table.rows) for table in tables]


def _numbered(runs: Mapping[str, Any]) -> Callable[[Sequence[str]], str]:
    """A cell's keys as places in the columns of `runs`: a key would take 24 letters. One that is not there is left
    out."""
    keys = runs.get("key", [])
    if isinstance(keys, Mapping):
        keys = [None if i is None else keys["values"][i] for i in keys["of"]]
    places = {key: str(index) for index, key in enumerate(keys)}

    def written(cell: Sequence[str]) -> str:
        own = ("+".join(places[part] for part in key.split("+") if part in places) for key in cell)
        return " ".join(text for text in own if text)

    return written


def _table(
    table: Table, name: str, links: Mapping[str, str], runs: Callable[[Sequence[str]], str], most: int
) -> _TableView:
    from markupsafe import Markup

    text, notes = html_table(table, links, runs, most)
    short = short_caption(table)
    rows = len(table.rows)
    stem = file_stem(table.name)
    left = f"The first {most} of {rows} rows; all are in the files {stem}.csv and {stem}.tex." if most < rows else ""
    rest = [sentence for sentence in table.caption if sentence not in short]
    title = table.title if table.title != table.task else "All metrics"
    view = [Markup(note) for note in notes]
    texts = [] if left else [to_latex(table), to_csv(table)]
    return _TableView(name, title, table.title, Markup(text), view, rest, left, rows > 25, texts)


def _figure(drawing: Drawing, name: str, prefix: str) -> _FigureView:
    from markupsafe import Markup

    svg = visible_lines(drawing.svg(prefix))  # a short one: thousands of references have it
    width = re.match(r'<svg[^>]*?\bwidth="([\d.]+)pt"', svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape_html(drawing.alt)}"', 1)
    heads = list(dict.fromkeys(name for mark in drawing.data for name in mark))
    rows = [[_number(mark.get(head)) for head in heads] for mark in drawing.data[:MOST_MARKS]]
    more = len(drawing.data)
    shortened = f"The first {MOST_MARKS} of {more} rows." if more > MOST_MARKS else ""
    points = float(width[1]) if width else 237.0
    return _FigureView(name, drawing.title, drawing.alt, Markup(svg), points, drawing.caption, heads, rows, shortened)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)
