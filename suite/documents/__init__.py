"""The parts of README.md and docs/ that say what the code says: made from it, and compared with it.

made.py         blocks by name, and the pages that hold them: rewritten or compared
norms.py        every norm, from its class and what it declares
tasks.py        every task, its options and metrics
commands.py     every command with its --help; the configs that ship
docstrings.py   the sections of a docstring
"""
