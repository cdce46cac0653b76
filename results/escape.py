r"""Any text as a line of a terminal, LaTeX, Markdown or a cell of CSV that prints it and does nothing else: labels,
option values and reasons come from people, plugins and files of others.
"""

from __future__ import annotations

import re
import unicodedata

_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0327": "c",
}
_CAPITALS = {"Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega"}
_GREEK = {"Alpha", "Beta", "Epsilon", "Zeta", "Eta", "Iota", "Kappa", "Mu", "Nu", "Rho", "Tau", "Chi", *_CAPITALS}
_TO_LATEX = {
    **{c: rf"\{c}" for c in "{}$&#_%"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": r"\textasciigrave{}",
    # LaTeX would read these three as an argument of the line break before them
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "†": r"$\dagger$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "−": "$-$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≠": r"$\neq$",
    "≈": r"$\approx$",
    "→": r"$\rightarrow$",
    "←": r"$\leftarrow$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "∞": r"$\infty$",
    "µ": r"$\mu$",
    "—": "---",
    "–": "--",
    "…": r"\ldots{}",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    "ß": r"\ss{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
}

# fmt: off
_PLAIN = {
    "±": "+-", "×": "x", "·": ".", "−": "-", "—": "-", "–": "-", "…": "...", "†": "#", "∞": "inf", "µ": "u",
    "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "→": "->", "←": "<-", "↑": "^", "↓": "v",
    "‘": "'", "’": "'", "“": '"', "”": '"',
}
# fmt: on
"""What stands for a character of ours in an encoding that lacks it."""
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Printable by Unicode's categories, yet without any ink or width: fillers, joiners, variation selectors."""
_FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def escape_latex(text: str) -> str:
    """Any text as LaTeX for pdflatex without font packages; a character that it can not print becomes U+XXXX."""
    text = unicodedata.normalize("NFC", one_line(text))
    text = "".join(_latex_character(c) for c in re.sub("-(?=-)", "-\0", text))
    return text.replace("\0", "{}")  # two hyphens would be joined to a dash


def escape_markdown(text: str) -> str:
    """Any text as Markdown, inside a table's cell too."""
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\|*`\[\]~$])", r"\\\1", text)
    # within a word an underscore is harmless, and names such as norm_batch_size stay readable
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def escape_csv(text: str) -> str:
    """Any text as a cell that no spreadsheet takes for a formula: "'" stands before =, +, - and @, but for numbers.

    Control characters become U+XXXX. The quotes of CSV itself are the writer's business.
    """
    text = visible(text)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def one_line(text: str) -> str:
    """Without line breaks, every run of white space one space; what does not show on a terminal becomes U+XXXX."""
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    """As it is, but for characters that do not show: control characters (a terminal's escape sequence, a line break),
    marks that turn the direction of text, and those without width become U+XXXX."""
    if text.isprintable() and not _UNSEEN.search(text):
        return text
    return "".join(c if c.isprintable() and not _UNSEEN.match(c) else _code(c) for c in text)


def cut(text: str, longest: int) -> str:
    """A text of at most `longest` characters: of a longer one the beginning and the end, with … between."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - 1 - end]}…{text[len(text) - end :]}"


def spell(text: str, encoding: str) -> str:
    """The text in characters that `encoding` has: "±" becomes "+-", a character without substitute becomes U+XXXX."""
    if _says(encoding, text):
        return text
    return "".join(c if _says(encoding, c) else _PLAIN.get(c) or _code(c) for c in text)


def columns_of(text: str) -> int:
    """Columns that a visible text takes on a terminal: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    seen = (c for c in text if unicodedata.category(c) not in ("Mn", "Me"))
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in seen)


def _says(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeError:
        return False
    return True


def _latex_character(c: str) -> str:
    if c in _TO_LATEX:
        return _TO_LATEX[c]
    if " " <= c <= "~" or c == "\0":
        return c
    kind, _, letter = unicodedata.name(c, "").replace("LAMDA", "LAMBDA").partition(" LETTER ")
    if kind == "GREEK SMALL" and letter.capitalize() in _GREEK:
        return rf"$\{letter.lower()}$"
    if kind == "GREEK CAPITAL" and letter.capitalize() in _CAPITALS:
        return rf"$\{letter.capitalize()}$"
    decomposed = unicodedata.normalize("NFD", c)
    base, marks = decomposed[0], decomposed[1:]
    if base.isascii() and base.isalpha() and marks in _ACCENTS:
        dotless = {"i": r"\i", "j": r"\j"}.get(base, base) if marks != "\u0327" else base
        return rf"\{_ACCENTS[marks]}{{{dotless}}}"
    return _code(c)


def _code(c: str) -> str:
    return f"U+{ord(c):04X}"
