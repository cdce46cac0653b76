"""A frame of runs -> figures, one function each.

drawing.py    a figure as a value, and its files
style.py      the one look of all figures
"""
