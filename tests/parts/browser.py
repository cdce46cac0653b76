"""A page in headless Chromium, Debian's: open a file, take a picture of it."""

import contextlib
import shutil
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DESKTOP, PHONE = (1280, 800), (360, 740)


@contextlib.contextmanager
def browser():
    """A running Chromium; closed, with everything that playwright started, when the block ends."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        # the sandbox needs a user other than root; the pages are our own
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            chromium.close()


@contextlib.contextmanager
def opened(chromium, file, size=DESKTOP, **context):
    """A page of its own context that shows `file` and whose tables have their buttons.

    `page.complaints` grows with each message of the console, each error of a script and each request but the file's.

    Args:
        chromium: of `browser`.
        file: an HTML file.
        size: width and height in CSS pixels.
        context: of playwright's `new_context`: color_scheme="dark", java_script_enabled=False, ...
    """
    inside = chromium.new_context(viewport={"width": size[0], "height": size[1]}, **context)
    try:
        page = inside.new_page()
        address = Path(file).resolve().as_uri()
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: page.complaints.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: (
                page.complaints.append(f"request: {request.url[:200]}")
                if request.url.partition("#")[0] != address and not request.url.startswith("data:")
                else None
            ),
        )
        page.goto(address)
        if context.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready]", state="attached")
        yield page
    finally:
        inside.close()


def screenshot(file, picture, size=DESKTOP, dark=False, whole=False, anchor=""):
    """Write a PNG of a page as a person sees it.

    Args:
        file: an HTML file.
        picture: where the PNG goes.
        size: width and height in CSS pixels.
        dark: with the colours of a dark screen.
        whole: the whole page, not the first screen.
        anchor: id of what the screen begins with; "": the top.
    """
    with browser() as chromium, opened(chromium, file, size, color_scheme="dark" if dark else "light") as page:
        if anchor:
            page.evaluate("id => document.getElementById(id).scrollIntoView({behavior: 'instant'})", anchor)
        if whole:
            page.add_style_tag(content="section { content-visibility: visible !important }")
        page.screenshot(path=str(picture), full_page=whole)
