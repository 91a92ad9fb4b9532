"""The page of `kdpp compare` in a real browser, headless Chromium: sorting, plots, pictures."""

import json
import shutil
from itertools import pairwise

import pytest

from kdpp.lab.compare import compare

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EVIL = "</script><i>x</i><img src=x onerror=alert(1)> & \"q\" 'p' " + 60 * "W"
SPEC = f"""\
title = {json.dumps(EVIL)}
images = 50
seeds = 2
teacher = "digits:teacher"
self_control = true
more_steps = false
best_teacher = false
[students]
{json.dumps(EVIL)} = "digits:student"
"B" = "digits:student"
"a" = "digits:student"
[[grid]]
student = ["B", {json.dumps(EVIL)}, "a"]
steps = [2, 10, 4]
[[grid]]
student = "B"
steps = 4
teacher_scale = [0.1, 0.5]
teacher_steps = [1, [0, 2]]
"""


def found(names):
    return next((path for path in map(shutil.which, names) if path), None)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; where there is none the tests say so."""
    program, driver = found(BROWSERS), found(("chromedriver",))
    if program is None or driver is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    pytest.importorskip("selenium", reason='needs selenium: pip install "kdpp[test]"')
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    with webdriver.Chrome(options=options, service=service) as opened:
        yield opened


@pytest.fixture(scope="module")
def path(browser, tmp_path_factory):
    """A page with many kinds of cells, and names that would be markup."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "spec.toml").write_text(SPEC, encoding="utf-8")
    compare(folder / "spec.toml", folder / "out")
    return folder / "out" / "report.html"


@pytest.fixture
def page(browser, path):
    """The page newly opened in a wide window, light."""
    look(browser, 1280, "light")
    browser.get(path.as_uri())
    return browser


def look(browser, width, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def all_of(page, css):
    return page.find_elements("css selector", css)


def head(page, column):
    return page.find_element("css selector", f'th[data-column="{column}"]')


def values(page, column):
    """What the column is sorted by, row by row; None where a cell has no entry."""
    script = """
        const heads = [...document.querySelectorAll("th[data-column]")];
        const place = heads.findIndex((head) => head.dataset.column === arguments[0]);
        return [...document.querySelectorAll("#table tbody tr")]
            .map((row) => row.cells[place].dataset.value ?? null);
    """
    return page.execute_script(script, column)


def press(page, css):
    button = page.find_element("css selector", css)
    where = "{block: 'center', inline: 'center', behavior: 'instant'}"
    page.execute_script(f"arguments[0].scrollIntoView({where})", button)
    button.click()


def sort(page, column):
    press(page, f'th[data-column="{column}"] button')
    return values(page, column)


def test_nothing_is_asked_of_the_network_and_nothing_fails(page, path):
    """Opened and used, the page has requested itself alone, and the console is empty."""
    for name in ("fd", "student"):
        sort(page, name)
    press(page, "#axes button:last-child")
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    urls = {one["request"]["url"] for one in sent}
    assert path.as_uri() in urls
    assert {url for url in urls if not url.startswith("data:")} == {path.as_uri()}
    assert page.get_log("browser") == []


def test_names_are_text(page):
    """Names that would be markup are shown as they are; no script of theirs runs."""
    assert page.title == EVIL
    assert page.find_element("tag name", "h1").text == EVIL
    assert EVIL in values(page, "student")
    assert EVIL in [button.text for button in all_of(page, "#legend button")]
    assert not all_of(page, "i, img[src='x']")


def test_numbers_sort_both_ways(page):
    """By value and not by text (10 after 4), then turned round; aria-sort says which."""
    assert [float(v) for v in sort(page, "steps")] == sorted([2, 4, 10] * 3 + [4] * 8)
    assert head(page, "steps").get_attribute("aria-sort") == "ascending"
    assert float(sort(page, "steps")[0]) == 10
    assert head(page, "steps").get_attribute("aria-sort") == "descending"
    rising = [float(value) for value in sort(page, "fd")]
    assert rising == sorted(rising) and len(set(rising)) > 5
    assert [float(value) for value in sort(page, "fd")] == rising[::-1]
    assert len(all_of(page, "th[aria-sort]")) == 1
    shown = all_of(page, "#table tbody tr")[0].text
    assert f"{rising[-1]:.1f} ±" in shown


def test_text_sorts_both_ways(page):
    """As a reader sorts: without regard to case."""
    names = sort(page, "student")
    assert list(dict.fromkeys(names)) == [EVIL, "a", "B"]
    assert sort(page, "student") == names[::-1]


@pytest.mark.parametrize("column", ["teacher_scale", "fd_change", "guide", "teacher_steps"])
def test_empty_entries_stay_at_the_end(page, column):
    """What a cell does not have comes last, whichever way the rest is sorted."""
    for _ in range(2):
        entries = sort(page, column)
        empty = [entry is None for entry in entries]
        assert any(empty) and empty == sorted(empty)
    filled = [entry for entry in entries if entry is not None]
    if column in ("teacher_scale", "fd_change"):
        assert all(float(a) >= float(b) for a, b in pairwise(filled))


def test_rows_move_whole(page):
    """Sorting moves lines, not entries."""
    before = {tuple(row.text.split()) for row in all_of(page, "#table tbody tr")}
    sort(page, "fd")
    assert {tuple(row.text.split()) for row in all_of(page, "#table tbody tr")} == before


def test_sorting_by_keyboard(page):
    """A header is a button: reached by the tab key, pressed by Enter and by the space bar."""
    from selenium.webdriver import ActionChains, Keys

    page.execute_script("""document.querySelector('th[data-column="cell"] button').focus()""")
    ActionChains(page).send_keys(Keys.TAB).perform()
    focused = page.switch_to.active_element
    assert focused.text == head(page, "fd").text == "mean"
    focused.send_keys(Keys.ENTER)
    assert head(page, "fd").get_attribute("aria-sort") == "ascending"
    focused.send_keys(Keys.SPACE)
    assert head(page, "fd").get_attribute("aria-sort") == "descending"


def test_plots(page):
    """Each figure is drawn: a point for every cell with its bar, axes with labels."""
    charts = all_of(page, "#charts figure")
    names = [chart.get_attribute("data-chart") for chart in charts]
    assert names == ["fd", "inception_score", "accuracy"]
    for chart in charts:
        assert len(chart.find_elements("css selector", "g.point path.mark")) == 17
        assert len(chart.find_elements("css selector", "text")) > 6
        assert chart.rect["width"] > 300 and chart.rect["height"] > 200
        bars = chart.find_elements("css selector", "g.point line.bar:first-of-type")
        lengths = [abs(float(b.get_attribute("y1")) - float(b.get_attribute("y2"))) for b in bars]
        assert len(lengths) == 17 and max(lengths) > 2
    marks = page.execute_script("""
        const svg = document.querySelector("#charts svg"), box = svg.getBoundingClientRect();
        return [...svg.querySelectorAll("path.mark")].every((mark) => {
            const m = mark.getBoundingClientRect();
            return m.left >= box.left && m.right <= box.right && m.top >= box.top
                && m.bottom <= box.bottom;
        });
    """)
    assert marks is True
    title = page.execute_script("return document.querySelector('g.point title').textContent")
    assert "FD: " in title and "±" in title


def test_the_front_is_drawn(page, path):
    """A stair along the cells that no other beats at their cost, as many steps as there are."""
    fronts = json.loads((path.parent / "results.json").read_bytes())["fronts"]
    drawn = {}
    for chart in all_of(page, "#charts figure"):
        name = chart.get_attribute("data-chart")
        drawn[name] = len(chart.find_elements("css selector", "path.front"))
        assert drawn[name] == max(len(fronts.get(name, {}).get("evaluations", [])) - 1, 0)
    assert drawn["fd"] > 0


def test_what_a_point_is_can_be_read(page):
    """λ stands beside a guided point, on nothing else; a tap on a mark says all of it."""
    for chart in all_of(page, "#charts figure"):
        tags = chart.find_elements("css selector", "text.tag")
        assert tags and all(tag.text.startswith("λ 0.") for tag in tags)
        covered = page.execute_script(
            """
            const boxes = (css) => [...arguments[0].querySelectorAll(css)]
                .map((one) => one.getBoundingClientRect());
            const tags = boxes("text.tag"), others = boxes("path.mark");
            const meet = (a, b) => a !== b && a.left < b.right && b.left < a.right &&
                a.top < b.bottom && b.top < a.bottom;
            return tags.some((tag) => [...tags, ...others].some((other) => meet(tag, other)));
            """,
            chart,
        )
        assert not covered
    from selenium.webdriver import ActionChains

    chart = all_of(page, "#charts figure")[0]
    detail = chart.find_element("css selector", ".detail")
    page.execute_script("arguments[0].scrollIntoView({behavior: 'instant'})", chart)
    for cell, count in ((16, 1), (1, 3)):  # three students have one checkpoint, and one point
        point = chart.find_element("css selector", f"g.point[data-cell='{cell}'] path.mark")
        title = page.execute_script("return arguments[0].parentNode.textContent", point)
        ActionChains(page).move_to_element(point).click().perform()
        assert " ".join(title.split()) in " ".join(detail.text.split())
        assert len(chart.find_elements("css selector", ".chosen")) == count
        assert detail.text.count("FD:") == count and ("λ 0.5" in detail.text) == (cell == 16)


def test_plots_against_other_costs(page):
    """The horizontal axis is chosen by buttons: evaluations, compute, time."""
    first = "#charts figure:first-child"
    places = []
    for number in (1, 2, 3):
        press(page, f"#axes button:nth-of-type({number})")
        pressed = [button.get_attribute("aria-pressed") for button in all_of(page, "#axes button")]
        assert pressed == ["true" if i == number else "false" for i in (1, 2, 3)]
        label = page.find_element("css selector", f"{first} svg").get_attribute("aria-label")
        marks = all_of(page, f"{first} path.mark")
        places.append((label, tuple(mark.get_attribute("transform") for mark in marks)))
    assert "evaluations" in places[0][0] and "millions" in places[1][0]
    assert "milliseconds" in places[2][0]
    assert len(set(places)) == 3


def test_the_legend_hides_a_series(page):
    """A press hides a student's points, another one brings them back."""
    count = len(all_of(page, "#charts figure:first-child path.mark"))
    press(page, "#legend button")
    assert len(all_of(page, "#charts figure:first-child path.mark")) < count
    for button in range(2, 4):
        press(page, f"#legend button:nth-of-type({button})")
    assert not all_of(page, "#charts path.mark")  # all are hidden: an empty plot, no error
    press(page, "#legend button")
    assert 0 < len(all_of(page, "#charts figure:first-child path.mark")) < count
    assert page.get_log("browser") == []


def test_measures_are_shown_and_hidden(page):
    """A figure's button shows its columns and its plot, or hides them."""
    names = [button.text for button in all_of(page, "#measures button")]
    kid = f"#measures button:nth-of-type({names.index('KID') + 1})"
    assert not head(page, "kid").is_displayed()
    press(page, kid)
    assert head(page, "kid").is_displayed() and head(page, "kid_change").is_displayed()
    assert "kid" in [chart.get_attribute("data-chart") for chart in all_of(page, "#charts figure")]
    press(page, kid)
    assert not head(page, "kid").is_displayed()


def test_samples(page):
    """Every cell has its picture, whole, and its number in the table leads to it."""
    assert len(all_of(page, "#samples figure[id] img")) == 17
    families = all_of(page, "#samples .tiles")
    for family in families:  # each beside real images
        assert family.find_elements("css selector", "figcaption")[0].text == "real images"
    assert len(all_of(page, "#samples img")) == 17 + len(families) == 20
    widths = page.execute_script(
        "return [...document.querySelectorAll('#samples img')].map((one) => one.naturalWidth)"
    )
    assert set(widths) == {10 * (3 * 8 + 2) - 2}
    targets = [link.get_attribute("href").split("#")[1] for link in all_of(page, "#table td a")]
    assert sorted(targets) == sorted(one.get_attribute("id") for one in all_of(page, "figure[id]"))


@pytest.mark.parametrize("width", [360, 800])
def test_narrow_screens(page, width):
    """Nothing but the table scrolls sideways, text stays legible, and the table begins with
    results: the cell, with its λ, and at least its FD and how that changes."""
    look(page, width, "light")
    page.refresh()
    wide, inner = page.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= inner <= width
    scroll = page.find_element("css selector", ".scroll")
    assert page.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", scroll)
    edge = scroll.rect["x"] + scroll.rect["width"]
    for column in ("cell", "fd", "fd_change"):
        assert head(page, column).rect["x"] + head(page, column).rect["width"] <= edge + 1
    names = [row.find_element("css selector", "td").text for row in all_of(page, "#table tbody tr")]
    assert sum("λ 0.1" in name for name in names) == 4
    text, scale = page.execute_script("""
        const svg = document.querySelector("#charts svg");
        const text = getComputedStyle(svg.querySelector("text")).fontSize;
        return [parseFloat(text), svg.getBoundingClientRect().width / svg.viewBox.baseVal.width];
    """)
    assert text * scale > 10


CONTRAST = """
    const light = (colour) => {
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => {
            const c = part / 255;
            return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = getComputedStyle(document.body).backgroundColor;
    const words = ["p", ".note", ".spread", ".better", "td", "thead button", "a", "figcaption"];
    return words.map((css) => {
        const one = document.querySelector(css);
        const [a, b] = [light(getComputedStyle(one).color), light(ground)];
        return [css, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), light(ground)];
    });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(page, scheme):
    """The page follows the reader's scheme, and all its text has a contrast of 4.5 or more."""
    look(page, 1280, scheme)
    for css, contrast, ground in page.execute_script(CONTRAST):
        assert contrast >= 4.5, (css, contrast)
        assert (ground > 0.5) == (scheme == "light")
