r"""A table as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from results.escape import escape_latex
from results.metrics import nearest
from results.tables.marked import LONGEST_SENTENCE, Style, marked_texts
from results.tables.stems import file_stem
from results.tables.table import Table

LATEX_ROWS = 40
"""A longer table is printed as several floats, so that each fits a page."""

_STYLE = Style(escape_latex, r"\textbf{%s}", r"\underline{%s}", r"\textsuperscript{%s}", r" $\pm$ ", "---")


CAPTIONS = ("short", "full", "none")
LONGEST_CAPTION = 2_500
r"""Characters of a \caption: LaTeX sets it on one line first, and TeX measures none of more than 16,384 pt."""


def to_latex(table: Table, caption: str = "short") -> str:
    r"""The table as one or more `table` floats: a fragment for \input; it needs the packages booktabs and graphicx.

    Args:
        table: what to print.
        caption: "short": the title and `table.short` above, all other sentences in small print below; "full": all of
            them above, of very many the last below; "none": the title above and nothing below but footnotes.

    Raises:
        ValueError: another word than these (with the nearest).
    """
    if caption not in CAPTIONS:
        raise ValueError(f'caption "{caption}": {" or ".join(CAPTIONS)}{nearest(caption, CAPTIONS)}')
    above, below = caption_sentences(table, caption)
    below = [s for s in table.caption if s not in above] if caption == "short" else below
    marked, notes = marked_texts(table, _STYLE)
    groups: list[list[int]] = [[]]
    for index, row in enumerate(table.rows):
        if len(groups[-1]) >= LATEX_ROWS or (
            groups[-1]
            and row.group != table.rows[groups[-1][-1]].group
            and len(groups[-1]) + sum(r.group == row.group for r in table.rows) > LATEX_ROWS
        ):
            groups.append([])
        groups[-1].append(index)
    width = len(table.columns)
    head = []
    if any(c.over for c in table.columns):
        spans, rules, start = [], [], 2
        for over, count in _runs([c.over for c in table.columns]):
            spans.append(rf"\multicolumn{{{count}}}{{c}}{{{_STYLE.escape(over)}}}")
            if over:
                rules.append(rf"\cmidrule(lr){{{start}-{start + count - 1}}}")
            start += count
        head = [" & ".join(["", *spans]) + r" \\", "".join(rules)]
    head.append(" & ".join(_STYLE.escape(t) for t in (table.heading, *(c.title for c in table.columns))) + r" \\")
    floats = []
    for part, indices in enumerate(groups):
        title = _STYLE.escape(table.title) + (" (continued)" if part else "")
        text = " ".join(_STYLE.escape(sentence, LONGEST_SENTENCE) for sentence in above) if not part else ""
        body: list[str] = []
        before = None
        for index in indices:
            row = table.rows[index]
            if row.group and row.group != before:
                body += [r"\midrule"] if before is not None else []
                body.append(rf"\multicolumn{{{width + 1}}}{{l}}{{\textit{{{_STYLE.escape(row.group)}}}}} \\")
            before = row.group
            body.append(" & ".join(marked[index]) + r" \\")
        lines = [
            r"\begin{table}[htbp]",
            r"\centering",
            rf"\caption[{title}]{{{f'{title}. {text}'.strip()}}}",
            *([rf"\label{{tab:{file_stem(table.name)}}}"] if not part else []),
            r"\par\medskip",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * width}}}",
            r"\toprule",
            *head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
        ]
        if notes:
            lines.append(r"\par\smallskip{\footnotesize " + "; ".join(notes) + r"\par}")
        if below and part == len(groups) - 1:
            said = " ".join(_STYLE.escape(sentence, LONGEST_SENTENCE) for sentence in below)
            lines.append(rf"\par\smallskip{{\footnotesize\raggedright {said}\par}}")
        floats.append("\n".join([*lines, r"\end{table}"]))
    return "% needs \\usepackage{booktabs,graphicx}\n" + "\n\n".join(floats) + "\n"


def caption_sentences(table: Table, caption: str) -> tuple[list[str], list[str]]:
    r"""The sentences of a \caption, and those of "full" beyond LONGEST_CAPTION, which stand below the table."""
    sentences = {"short": table.short, "full": table.caption, "none": ()}[caption]
    room = LONGEST_CAPTION
    for count, sentence in enumerate(sentences):
        room -= min(len(sentence), LONGEST_SENTENCE) + 1
        if room < 0:
            return list(sentences[:count]), list(sentences[count:])
    return list(sentences), []


def latex_document(tables: Sequence[Table], caption: str = "short") -> str:
    """A complete LaTeX document of all tables; pdflatex compiles it as it is. caption: as in `to_latex`."""
    parts = [f"{to_latex(table, caption)}\\clearpage" for table in tables]
    return "\n".join(
        [
            r"\documentclass{article}",
            r"\usepackage[margin=15mm]{geometry}",
            r"\usepackage{booktabs,graphicx}",
            r"\begin{document}",
            *(parts or ["No tables."]),
            r"\end{document}",
            "",
        ]
    )


def _runs(values: Sequence[str]) -> list[tuple[str, int]]:
    """Neighbours that are equal, counted: aab -> (a, 2), (b, 1)."""
    result: list[tuple[str, int]] = []
    for value in values:
        if result and result[-1][0] == value:
            result[-1] = (value, result[-1][1] + 1)
        else:
            result.append((value, 1))
    return result
