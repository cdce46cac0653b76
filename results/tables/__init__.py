"""A frame of runs -> tables, and their formats.

pivot.py     one task's runs, arranged in rows, settings and seeds
build.py     which tables there are, and what stands in them
table.py     a table as data
captions.py  the sentences under it
render.py    CSV, LaTeX, Markdown and text
"""
