"""The report in a real Chromium, from disk: sorting, filtering, a case, decisions and their download."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from fake_run import fake_run, least_organ
from PIL import Image

from nnunet_flare.report.page import write_report
from nnunet_flare.rounds.run.decisions import read_reviews

CASES = [f"case_{number:04d}" for number in range(1000)]
HOSTILE_CASE = "case_<b>bold</b>_&amp;"
HOSTILE_ORGANS = ("liver", '<img src=x onerror="document.title=1">', "spleen, upper")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def browser(folder):
    """A headless Chromium that saves downloads to ``folder/downloads`` and keeps logs of its console and network."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install selenium)")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with its driver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    software = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")  # WebGL without a GPU
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", *software):
        options.add_argument(argument)
    options.add_argument("--window-size=1366,850")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


@pytest.fixture(scope="module")
def run(folder):
    made = fake_run(folder / "plain", cases=CASES, rounds=2, pictured=3)
    write_report(made, pictures=None, view3d=True)
    return made


@pytest.fixture
def page(browser, run):
    """The report, freshly opened without earlier decisions; afterwards its console and requests are checked."""
    url = (run.paths.report / "index.html").as_uri()
    browser.get(url)
    browser.execute_script("localStorage.clear()")
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(url)
    yield browser
    assert console(browser) == []
    assert requests(browser, url.rpartition("/")[0])


def console(browser) -> list[str]:
    """What the console says, without the driver's remarks on the speed of WebGL in software."""
    said = [entry["message"] for entry in browser.get_log("browser")]
    return [message for message in said if "GL Driver Message (OpenGL, Performance" not in message]


def requests(browser, start: str) -> list[str]:
    """The addresses that the page asked for; all of them must lie in the report's folder."""
    found = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            found.append(message["params"]["request"]["url"])
    outside = [url for url in found if not url.startswith((start, "blob:", "data:"))]
    assert outside == []
    return found


def find(page, selector: str):
    return page.find_element("css selector", selector)


def column(page, number: int) -> list[str]:
    """The texts of a column in the rows that are drawn."""
    script = (
        "return [...document.querySelectorAll(`tr[data-index] td:nth-child(${arguments[0]})`)].map(c => c.textContent)"
    )
    return page.execute_script(script, number)


def choose(page, selector: str, text: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(find(page, selector)).select_by_visible_text(text)


def press(page, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(page).send_keys(*keys).perform()


def screenshot(page, name: str) -> None:
    """Kept in the folder that FLARE_SCREENSHOTS names, for people to look at."""
    target = os.environ.get("FLARE_SCREENSHOTS")
    if target:
        Path(target).mkdir(parents=True, exist_ok=True)
        page.save_screenshot(str(Path(target) / f"{name}.png"))


def downloaded(folder: Path) -> Path:
    path = folder / "downloads" / "decisions.csv"
    for _ in range(100):
        if path.is_file():
            return path
        time.sleep(0.05)
    raise AssertionError(f"nothing was downloaded: {list(path.parent.glob('*'))}")


def test_the_overview_shows_the_rounds(page):
    screenshot(page, "overview")
    assert find(page, "#overview tbody tr th").text == "r0"
    assert len(page.find_elements("css selector", "svg.boxes rect")) == 2 * 13


def test_the_table_sorts_by_every_column_both_ways(page):
    assert find(page, "#count").text == "1000 of 2000 rows"  # the last round
    for number, key in enumerate(("case", "round", "decision", "score", "mean"), start=1):
        button = find(page, f"th button[data-key={key}]")
        button.click()
        rising = column(page, number)
        assert rising == sorted(rising) and len(rising) > 10
        button.click()
        falling = column(page, number)
        assert falling == sorted(falling, reverse=True)
        assert find(page, f"#table th:nth-child({number})").get_attribute("aria-sort") == "descending"
    assert column(page, 4)[0] >= column(page, 4)[-1]


def test_the_table_filters_by_text_round_decision_and_organ_score(page):
    find(page, "#text").send_keys("case_0007")
    assert set(column(page, 1)) == {"case_0007"}
    choose(page, "#round", "all")
    assert sorted(column(page, 2)) == ["r0", "r1"]
    find(page, "button[type=reset]").click()
    find(page, "#text").send_keys("pancreas")  # the least certain organ
    assert column(page, 6) and all(text.endswith("pancreas") for text in column(page, 6))
    find(page, "button[type=reset]").click()
    choose(page, "#decision", "refused")
    assert set(column(page, 3)) == {"refused"}
    choose(page, "#organ", "spleen")
    find(page, "#high").send_keys("0.5")
    find(page, "#low").send_keys("0.4")
    highest = column(page, 4)
    find(page, "th button[data-key=score]").click()
    lowest = column(page, 4)
    assert 0.45 < float(highest[0]) <= 0.5 and 0.4 <= float(lowest[0]) < 0.45
    assert 0 < int(find(page, "#count").text.split()[0]) < 1000
    screenshot(page, "filtered")


def test_two_thousand_rows_are_sorted_and_scrolled_without_lag(page):
    choose(page, "#round", "all")
    seconds = page.execute_script(
        "const t = performance.now(); document.querySelector('th button[data-key=reason]').click();"
        "document.body.offsetHeight; return (performance.now() - t) / 1000"
    )
    assert seconds < 1
    assert len(column(page, 1)) < 100  # only what is in view is in the page
    page.execute_script("const s = document.querySelector('#scroller'); s.scrollTop = s.scrollHeight")
    last = (
        "return new Promise(r => requestAnimationFrame(() => requestAnimationFrame("
        "() => r(document.querySelector('#table tbody').lastChild.dataset.index))))"
    )
    assert page.execute_script(last) == "1999"
    height = page.execute_script("return document.querySelector('#scroller').scrollHeight")
    assert abs(height - 2000 * 30) < 100  # rows that are not drawn keep their place
    screenshot(page, "end of the table")


def test_a_case_opens_with_its_picture_and_its_decision_is_downloaded(page, run, folder):
    find(page, "#text").send_keys("case_0001")
    find(page, "tr[data-index='0']").click()
    assert find(page, "#case-name").text == "case_0001"
    assert (
        page.execute_script(
            "const p = document.querySelector('#picture'); return p.decode().then(() => p.naturalWidth)"
        )
        == 900
    )
    assert find(page, "#picture-organ").text == least_organ(run, 1, "case_0001").replace("_", " ")
    screenshot(page, "case")
    find(page, "#reject").click()
    assert find(page, "#review-state").text == "Your decision: reject"
    find(page, "#comment").send_keys('a "stent", metal')
    screenshot(page, "rejected")
    find(page, "#close").click()
    assert column(page, 8) == ["reject"]
    open_case(page, "case_0002")
    for organ in ("liver", "spleen"):
        find(page, f"button[aria-label='{organ} is wrong']").click()
    find(page, "#close").click()
    page.refresh()  # decisions outlive the page
    assert find(page, "#download").text == "Download decisions (2)"
    find(page, "#download").click()
    path = downloaded(folder)
    rows = list(csv.reader(path.read_text().splitlines()))
    assert rows == [
        ["case", "decision", "organ", "comment"],
        ["case_0001", "reject", "", 'a "stent", metal'],
        ["case_0002", "organ-wrong", "liver", ""],
        ["case_0002", "organ-wrong", "spleen", ""],
    ]
    reviews = read_reviews(path, CASES, ("liver", "spleen"))
    assert [(r.case, r.decision, r.organs) for r in reviews] == [
        ("case_0001", "reject", ()),
        ("case_0002", "organ-wrong", ("liver", "spleen")),
    ]


def test_closing_a_case_does_not_take_the_focus_from_what_is_typed_next(page):
    open_case(page, "case_0001")
    focused = page.execute_script(
        "const text = document.querySelector('#text'), dialog = document.querySelector('#case');"
        "const over = new Promise(r => dialog.addEventListener('close', () => setTimeout(r)));"
        "document.querySelector('#close').click();"
        "const back = document.activeElement.id; text.focus();"
        "return over.then(() => [back, document.activeElement.id])"
    )
    assert focused == ["scroller", "text"]


def test_decisions_in_two_tabs_of_one_report_are_all_kept(page, run):
    first = page.current_window_handle
    page.switch_to.new_window("tab")
    try:
        page.get((run.paths.report / "index.html").as_uri())
        open_case(page, "case_0001")
        page.switch_to.window(page.window_handles[0])
        open_case(page, "case_0002")
        find(page, "#reject").click()
        page.switch_to.window(page.window_handles[1])
        find(page, "#accept").click()
        assert find(page, "#download").get_property("textContent") == "Download decisions (2)"
    finally:
        page.close()
        page.switch_to.window(first)
    page.refresh()
    assert find(page, "#download").text == "Download decisions (2)"


def test_a_browser_that_keeps_no_decisions_says_so_and_asks_before_they_are_lost(page):
    assert not find(page, "#unkept").is_displayed()
    page.execute_script("Storage.prototype.setItem = () => { throw new Error('full'); }")
    for name, button in (("case_0001", "#accept"), ("case_0002", "#reject")):
        open_case(page, name)
        find(page, button).click()
        find(page, "#close").click()
    assert find(page, "#download").text == "Download decisions (2)"
    assert "Download them before you leave" in find(page, "#unkept").text
    asked = "const e = new Event('beforeunload', {cancelable: true}); dispatchEvent(e); return e.defaultPrevented"
    assert page.execute_script(asked)
    page.execute_script("localStorage.clear()")


def open_case(page, name: str) -> None:
    find(page, "#text").clear()
    find(page, "#text").send_keys(name)
    find(page, "tr[data-index='0']").click()
    assert find(page, "#case-name").text == name


def wait_for(page, selector: str, text: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 60).until(lambda driver: text in find(driver, selector).text)


def wait_for_slices(page) -> None:
    """The picture of the slices is loaded and shown, and the view in 3-D is not."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 60).until(
        lambda driver: find(driver, "#picture").is_displayed() and not find(driver, "#view").is_displayed()
    )


def colours_shown(page, selector: str) -> set[tuple[int, int, int]]:
    """The colours of an element on the screen."""
    with Image.open(io.BytesIO(find(page, selector).screenshot_as_png)) as picture:
        return {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}


def test_a_case_is_viewed_in_3d_and_in_slices(page, run):
    open_case(page, "case_0001")
    wait_for_slices(page)
    find(page, "#solid").click()
    wait_for(page, "#view-organ", least_organ(run, 1, "case_0001").replace("_", " "))
    assert find(page, "#view-message").text == "" and not find(page, "#picture").is_displayed()
    shown = colours_shown(page, "#canvas")
    assert len(shown) > 100  # grey values and the organs' colours
    assert any(blue > red + 60 for red, _, blue in shown) and any(red > blue + 60 for red, _, blue in shown)
    screenshot(page, "3d view")
    press(page, "v")
    wait_for_slices(page)
    press(page, "v")
    find(page, "#close").click()
    open_case(page, "case_0002")  # the view stays chosen from case to case
    wait_for(page, "#view-organ", least_organ(run, 1, "case_0002").replace("_", " "))
    find(page, "#close").click()
    open_case(page, "case_0500")  # which has none
    assert not find(page, "#tabs").is_displayed() and find(page, "#no-picture").is_displayed()


def test_without_webgl_the_view_says_so_and_the_slices_stay(page):
    script = """const get = HTMLCanvasElement.prototype.getContext;
        HTMLCanvasElement.prototype.getContext = function (kind, ...more) {
          return kind.startsWith("webgl") ? null : get.call(this, kind, ...more); };"""
    added = page.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        page.refresh()
        open_case(page, "case_0001")
        find(page, "#solid").click()
        wait_for(page, "#view-message", "needs WebGL 2")
        wait_for_slices(page)
        screenshot(page, "without webgl")
        find(page, "#slices").click()
        assert find(page, "#view-message").text == ""
    finally:
        page.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": added["identifier"]})


def test_a_view_that_was_not_copied_along_is_named(browser, folder):
    made = fake_run(folder / "parted", cases=["case_0000"], rounds=1, pictured=1)
    write_report(made, pictures=None, view3d=True)
    (made.paths.report / "volumes" / "r0" / "case_0000.js").unlink()
    browser.get((made.paths.report / "index.html").as_uri())
    find(browser, "tr[data-index='0']").click()
    find(browser, "#solid").click()
    wait_for(browser, "#view-message", "volumes/r0/case_0000.js is missing: copy the whole folder")
    browser.get_log("browser")


def test_everything_can_be_done_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    find(page, "th button[data-key=case]").click()
    press(page, "/")
    press(page, "case_000")
    assert find(page, "#text").get_attribute("value") == "case_000"
    page.execute_script("document.querySelector('#scroller').focus()")
    press(page, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ENTER)
    assert find(page, "#case-name").text == "case_0001"
    press(page, "r", Keys.ARROW_RIGHT, "a", Keys.ARROW_RIGHT, "w")
    assert find(page, "#case-name").text == "case_0003"
    assert find(page, "#no-picture").is_displayed()
    press(page, Keys.ARROW_RIGHT, "a", "u", Keys.ESCAPE)
    assert not find(page, "#case").is_displayed()
    reviews = column(page, 8)
    assert reviews[:3] == ["", "reject", "accept"] and reviews[3].startswith("wrong: ") and reviews[4] == ""


def test_hostile_names_are_shown_as_they_are(browser, folder):
    hostile = fake_run(folder / "hostile", cases=[HOSTILE_CASE], rounds=1, pictured=0, organs=HOSTILE_ORGANS)
    write_report(hostile)
    browser.get((hostile.paths.report / "index.html").as_uri())
    assert column(browser, 1) == [HOSTILE_CASE]
    find(browser, "tr[data-index='0']").click()
    assert find(browser, "#case-name").text == HOSTILE_CASE
    assert HOSTILE_ORGANS[1] in find(browser, "#organs").text
    assert (
        browser.execute_script(
            "return document.querySelectorAll('#case img:not(#picture), b:not(#picture-organ, #view-organ)').length"
        )
        == 0
    )
    assert browser.title.startswith("look: ")
    assert console(browser) == []


@pytest.fixture
def phone(page):
    """The page on a window of 390 pixels."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.get(page.current_url)
    yield page
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


BROKEN_WORDS = """
// words of a table that stand on more than one line
const broken = [];
for (const cell of document.querySelectorAll(arguments[0])) {
  const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    for (const match of walker.currentNode.textContent.matchAll(/[\\w.]+/g)) {
      const range = document.createRange();
      range.setStart(walker.currentNode, match.index);
      range.setEnd(walker.currentNode, match.index + match[0].length);
      if (new Set([...range.getClientRects()].map((r) => Math.round(r.top))).size > 1) broken.push(match[0]);
    }
  }
}
return broken;
"""


def test_a_phone_shows_it_without_breaking_words_or_scrolling_sideways(phone):
    assert phone.execute_script("return document.documentElement.scrollWidth") <= 390
    assert phone.execute_script(BROKEN_WORDS, "#overview th, #overview td, #overview h3") == []
    screenshot(phone, "phone")
    find(phone, "#text").send_keys("case_0001")
    find(phone, "tr[data-index='0']").click()
    assert phone.execute_script(BROKEN_WORDS, "#organs th, #organs td, #history th") == []
    box = find(phone, "#case").rect
    assert box["x"] >= 0 and box["x"] + box["width"] <= 391
    assert find(phone, "#picture").rect["width"] > 340
    screenshot(phone, "phone_case")


def test_a_picture_is_as_large_as_the_window_allows(page):
    size = {"width": 1920, "height": 1080, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        find(page, "#text").send_keys("case_0001")
        find(page, "tr[data-index='0']").click()
        assert find(page, "#picture").rect["width"] > 800
        link = find(page, "#picture-link").get_attribute("href")
        assert link.endswith("pictures/r1/case_0001.jpg")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
