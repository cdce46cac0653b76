"""A frame of runs -> tables, and their formats.

pivot.py     one task's runs, arranged in rows, settings and seeds
build.py     which tables there are, and what stands in them
table.py     a table as data
captions.py  the sentences under it
overall.py   the ranking over all tasks
marked.py    cells as texts: what the formats share
csv.py latex.py markdown.py text.py   one format each
page.py      a page of findings, of several tables
writing.py   every format's files in a folder, by the names of stems.py
"""
