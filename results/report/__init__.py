"""One self-contained page per folder of results.

content.py    what stands in it, as values
"""
