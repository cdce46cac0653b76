"""One self-contained page per folder of results.

content.py    what stands in it, as values
page.py       them as one HTML file, by page.html, page.css and page.js beside it
"""
