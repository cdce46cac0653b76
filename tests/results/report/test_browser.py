"""The report in headless Chromium: what a person does with it, and what the page must never do."""

import re

import pytest
from parts import reports
from parts.browser import DESKTOP, PHONE, browser, opened

from results.report.content import LARGEST
from results.report.page import page as written
from results.tables.csv import to_csv
from results.tables.latex import to_latex

pytestmark = pytest.mark.program("chromium")


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    contents = {"plain": reports.report(), "odd": reports.report(reports.ODD, reports.EVIL)}
    for name, content in contents.items():
        (folder / f"{name}.html").write_text(written(content), encoding="utf-8")
    return contents, folder


@pytest.fixture(scope="module")
def shared(chromium, files):
    """One page for all tests that leave it as it was."""
    with opened(chromium, files[1] / "plain.html") as page:
        yield page
        assert page.complaints == []


@pytest.fixture
def page(shared):
    shared.reload()
    shared.wait_for_selector("html[data-ready]", state="attached")
    yield shared
    assert shared.complaints == []


COPIED = """async () => {
    while (!window.copied) await new Promise((done) => setTimeout(done, 5));
    const text = window.copied;
    window.copied = "";
    return text;
}"""


def block(page, name="classification"):
    return page.locator(f'.block[data-table="table-{name}"]')


def pressed(cell):
    """The panel, open, of a number."""
    cell.click()
    panel = cell.page.locator("#panel[open]")
    panel.locator(".run").first.wait_for()
    return panel


def labels(page, name="classification"):
    return block(page, name).locator("tbody th[scope=row]:visible").all_inner_texts()


def serious(page, rules):
    """What axe-core finds, of these of its rules (None: all)."""
    from axe_playwright_python.sync_playwright import Axe

    options = {"resultTypes": ["violations"], **({"runOnly": rules} if rules else {})}
    found = Axe().run(page, options=options).response["violations"]
    return [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]


def test_a_click_on_a_heading_sorts_within_each_setting_with_holes_last(page):
    one, two, three = "bn", "gn(num_groups=8)b", "ln"
    table = block(page)
    assert labels(page) == [one, two, three] * 2
    by_top1 = table.get_by_role("button", name="top-1")
    by_top1.click()
    assert labels(page) == [three, two, one] * 2
    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    assert "descending, within each setting" in page.locator("#said").inner_text()
    by_step = table.get_by_role("button", name="step")
    by_step.click()
    assert labels(page) == [three, two, one] * 2
    by_step.click()
    assert labels(page) == [two, three, one] * 2  # the hole stays last
    assert table.locator("th[aria-sort]").count() == 1
    by_step.click()
    assert labels(page) == [one, two, three] * 2
    assert table.locator("th[aria-sort]").count() == 0


def test_the_filter_leaves_rows_of_a_norm_or_of_a_setting(page):
    box = block(page).get_by_role("searchbox")
    box.fill("GN")
    assert labels(page) == ["gn(num_groups=8)b"] * 2
    assert block(page).locator("output").inner_text() == "2 of 6 rows"
    box.fill("gn size=64")
    assert labels(page) == ["gn(num_groups=8)b"]
    assert block(page).locator("tbody:visible").count() == 1
    box.fill("nothing")
    assert labels(page) == []
    assert page.locator("#said").inner_text() == "0 of 6 rows shown."
    box.fill("")
    assert len(labels(page)) == 6


def test_columns_are_chosen(page):
    table = block(page)
    table.get_by_text("Columns", exact=True).click()
    table.get_by_role("checkbox", name="top-1").uncheck()
    assert table.locator("thead th:visible").all_inner_texts() == ["norm", "step (ms)\u00a0↓"]
    assert table.locator("tbody td:visible").count() == 6
    assert page.locator("#said").inner_text() == "1 of 2 columns shown."
    table.get_by_role("checkbox", name="top-1").check()
    assert table.locator("tbody td:visible").count() == 12


def test_a_number_opens_its_runs_with_their_curves_and_artifacts(page, files):
    panel = pressed(block(page).locator("tbody .cell", has_text="67.7"))
    runs = files[0]["plain"].runs
    assert panel.locator("h2").inner_text() == "gn(num_groups=8): 2 runs"
    assert "norm_batch_size=2 · top-1 (%)\u00a0↑: 67.7" in panel.locator(".body > p").inner_text()
    rows = panel.locator(".runs-of tbody tr").all_inner_texts()
    assert [row.split("\t")[:3] for row in rows] == [["0", "67.7", "ok"], ["1", "—", "diverged"]]
    keys = [key for key in runs["key"] if key.startswith("0201")]
    assert [s.split(" · ")[2] for s in panel.locator(".run summary").all_inner_texts()] == keys
    curve = panel.get_by_role("img", name="train_loss")
    assert "seed 0 from 1.5 to 1; seed 1 from 1.5 to 1" in curve.get_attribute("aria-label")
    assert curve.locator("circle").count() == 5  # of six values one is not finite
    again = panel.get_by_role("img", name="two_trainings").locator("path[stroke]").all()
    assert [path.get_attribute("d").count("M") for path in again] == [2, 2]  # no line joins one with the next
    panel.locator(".run summary").nth(1).click()
    run = panel.locator(".run").nth(1)
    assert "loss was nan: plain" in run.inner_text()
    assert f"runs/classification/bn/{keys[1]}" in run.inner_text()
    picture = run.get_by_role("img", name="a.svg")
    assert picture.get_attribute("src").startswith("data:image/svg+xml")
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 40
    assert run.locator("pre").inner_text() == "plain"


def test_every_number_opens_the_runs_of_its_cell(page, files):
    for name, place in (("classification", 0), ("by_batch", 1)):
        table = files[0]["plain"].tables[place]
        wanted = [cell.keys for row in table.rows for cell in row.cells]
        buttons = block(page, name).locator("tbody .cell")
        assert buttons.count() == len(wanted)
        for place_of, keys in list(enumerate(wanted))[:: len(wanted) - 1]:
            summaries = pressed(buttons.nth(place_of)).locator(".run summary").all_inner_texts()
            assert tuple(s.split(" · ")[2] for s in summaries) == keys
            page.keyboard.press("Escape")
    assert block(page, "overall").locator(".cell").count() == 0  # a rank has no runs of its own


def test_the_keyboard_reaches_and_opens_a_number_and_comes_back(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    block(page).locator("thead .sort").last.focus()
    texts = []
    for key in ("Tab", "Tab", "ArrowDown", "ArrowRight", "ArrowDown", "End", "Home", "ArrowUp"):
        page.keyboard.press(key)
        texts.append(page.evaluate("document.activeElement.textContent"))
    assert texts[0] == "bn"  # the link to the norm's card
    assert [re.sub(" ±.*|[a-z]+$", "", t) for t in texts[1:]] == [
        "63.2",
        "67.7",
        "29.0",
        "28.0",
        "28.0",
        "73.2",
        "67.7",
    ]
    page.keyboard.press("Enter")
    page.locator("#panel[open] .run").first.wait_for()
    assert page.evaluate("document.activeElement.id") == "panel-title"
    page.keyboard.press("Escape")
    assert page.locator("#panel").is_hidden()
    assert page.evaluate("document.activeElement.textContent").startswith("67.7")


def test_a_table_is_copied_as_latex_and_csv_and_shown_where_copying_is_refused(page, files):
    table = files[0]["plain"].tables[0]
    page.evaluate("() => { navigator.clipboard.writeText = async (text) => { window.copied = text; }; }")
    for kind, text in (("LaTeX", to_latex(table)), ("CSV", to_csv(table))):
        block(page).get_by_role("button", name=f"Copy as {kind}").click()
        assert page.evaluate(COPIED) == text
    page.evaluate("() => { navigator.clipboard.writeText = async () => { throw new Error('refused'); }; }")
    block(page).locator(".act").last.click()
    area = page.locator("#panel textarea")
    assert area.input_value() == to_csv(table)
    selected = "area => area.selectionEnd - area.selectionStart"
    assert area.evaluate(selected) == len(to_csv(table))


def test_a_row_leads_to_the_card_of_its_norm(page):
    # what is drawn on the way there is taller than it was before
    page.add_style_tag(content="section { contain-intrinsic-size: auto 40px } .block, .card { min-height: 2000px }")
    block(page).locator("tbody a").first.click()
    assert page.url.endswith("#norm-bn")
    assert page.locator("#norm-bn").is_visible()
    page.wait_for_timeout(300)
    assert 0 <= page.evaluate("document.getElementById('norm-bn').getBoundingClientRect().top") < 200


# what is dark differs in colours only
@pytest.mark.parametrize(
    ("scheme", "rules"), [("light", None), pytest.param("dark", ["color-contrast"], marks=pytest.mark.slow)]
)
def test_axe_finds_nothing_serious_in_page_or_panel(chromium, files, scheme, rules):
    with opened(chromium, files[1] / "odd.html", color_scheme=scheme, reduced_motion="reduce") as page:
        page.add_style_tag(content="section { content-visibility: visible !important }")
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert serious(page, rules) == []
        pressed(block(page).locator(".cell").nth(2)).locator(".run summary").first.click()
        assert serious(page, rules) == []
        assert page.complaints == []


def test_names_with_markup_stay_texts_and_no_script_of_an_artifact_runs(chromium, files):
    with opened(chromium, files[1] / "odd.html") as page:
        page.on("dialog", lambda dialog: page.complaints.append(f"dialog: {dialog.message}"))
        panel = pressed(block(page).locator(".cell").first)
        assert panel.locator("h2").inner_text() == f"{reports.EVIL}: 2 runs"
        panel.locator(".run summary").first.click()
        assert panel.locator(".run pre").first.inner_text() == reports.EVIL
        assert page.locator("img").count() == panel.locator("img[src^='data:image/svg+xml']").count() == 2
        page.keyboard.press("Escape")
        block(page).get_by_role("searchbox").fill(reports.EVIL)
        assert len(labels(page)) == 2
        assert page.complaints == []


@pytest.mark.parametrize("scripts", [True, False])
def test_a_phone_scrolls_tables_but_never_the_page_sideways(chromium, files, scripts):
    with opened(chromium, files[1] / "odd.html", PHONE, java_script_enabled=scripts) as page:
        widths = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        wide, screen = page.evaluate(widths)
        assert wide <= screen == PHONE[0]
        if scripts:
            panel = pressed(block(page).locator(".cell").first)
            assert panel.evaluate("panel => panel.scrollWidth - panel.clientWidth") <= 0
            assert panel.bounding_box()["width"] <= PHONE[0]
        else:
            assert len(labels(page)) == 10
            assert page.locator("button:visible").count() == 0
            assert page.locator("figure svg").count() == 2


@pytest.mark.slow
def test_ten_thousand_runs_are_painted_soon_and_stay_small(chromium, tmp_path):
    """First paint in Chromium, the median of three; the page's bytes; and that a number still opens its runs."""
    file = tmp_path / "large.html"
    file.write_text(written(reports.large(10_000)), encoding="utf-8")
    assert file.stat().st_size <= LARGEST
    paints = []
    for _ in range(3):
        with opened(chromium, file) as page:
            paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
            paints.append(page.evaluate(paint))
            pressed(block(page).locator(".cell").first)
            assert page.complaints == []
    assert sorted(paints)[1] < 1500


def test_it_prints_whole_tables_and_captions_without_buttons(chromium, files):
    with opened(chromium, files[1] / "plain.html", DESKTOP) as page:
        page.emulate_media(media="print")
        assert page.locator("nav, .tools, .skip").locator("visible=true").count() == 0
        assert page.get_by_text("Common: plain.").first.is_visible()
        pdf = page.pdf(prefer_css_page_size=True)
        assert pdf.startswith(b"%PDF")
        assert 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
        assert page.complaints == []
