"""A frame of runs -> tables, and their formats.

pivot.py     one task's runs, arranged in rows, settings and seeds
build.py     which tables there are, and what stands in them
table.py     a table as data
captions.py  the sentences under it
overall.py   the ranking over all tasks
marked.py    cells as texts: what the formats share
csv.py html.py latex.py markdown.py text.py   one format each
paper.py     the table of a paper: norms by tasks, each with its headline metric
choices.py   what a person asks it for by name
paper_style.py   the keys of a style file, which are the options of the command
grid.py      a table as heads, labels and entries, turned if asked for
styled.py    by the Styler of pandas: HTML, Excel
paper_latex.py   LaTeX that fits a column, or a page, of a two-column document
widths.py    how wide a text will be there
page.py      a page of findings, of several tables
writing.py   every format's files in a folder, by the names of stems.py
"""
