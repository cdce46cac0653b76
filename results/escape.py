r"""Any text as LaTeX or Markdown that prints it: labels and option values come from people and plugins."""

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


def one_line(text: str) -> str:
    """Without line breaks; what can not be printed (a terminal's escape sequence, say) becomes U+XXXX."""
    return "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in " ".join(text.split()))


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
