"""A two-column article around tables of papers, compiled, and their widths as TeX measured them."""

import re
import subprocess

PAGE = r"""\documentclass[twocolumn]{article}
\usepackage[textwidth=492pt,columnsep=18pt]{geometry}
\usepackage{booktabs,siunitx}
\begin{document}
%s
\end{document}
"""


def compiled(texts, folder, name="article"):
    """The article of these floats, compiled by pdflatex in a folder.

    Returns:
        The width in pt of each float's tabular, set in the float's size and gaps; and the lines about overfull boxes.
    """
    parts = []
    for text in texts:
        (setting,) = re.findall(r"\\par\\smallskip(\\\w+\\setlength.*?\\end\{tabular\})", text, re.DOTALL)
        parts += [text, rf"\sbox0{{{setting}}}\typeout{{WIDTH \the\wd0}}", r"\clearpage"]
    (folder / f"{name}.tex").write_text(PAGE % "\n".join(parts))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", f"{name}.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    log = done.stdout.decode(errors="replace")
    assert done.returncode == 0, log[-2000:]
    widths = [float(width) for width in re.findall(r"WIDTH ([\d.]+)pt", log)]
    return widths, re.findall(r"Overfull \\hbox.*", log)
