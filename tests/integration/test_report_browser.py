"""The report in a browser: both colour schemes, a desk's and a phone's width, no network, no scripts."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from agent_forge.dashboard.collect import collect
from agent_forge.dashboard.page import html_page
from tests.unit import sample_session as sample

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the test extra has it)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no system Chromium: install the package `chromium`")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("report")
    storage = sample.sample_session(home / "storage", phases=4)
    path = home / "report.html"
    path.write_text(html_page(collect(storage, sample.SESSION)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        # Inside containers the kernel often forbids Chromium its own sandbox; the page is ours and runs no script.
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, report):
    """Opens the report at a width and in a scheme; fails the test on any request, message or error."""
    opened, told = [], []

    def show(width: int = 1280, scheme: str = "light"):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        opened.append(context)
        sheet = context.new_page()
        sheet.on("console", lambda message: told.append(message.text))
        sheet.on("pageerror", lambda error: told.append(str(error)))
        sheet.on("request", lambda request: told.append(request.url) if request.url != report.as_uri() else None)
        sheet.goto(report.as_uri())
        return sheet

    yield show
    for context in opened:
        context.close()
    assert told == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out_at_any_width(page, width, scheme):
    sheet = page(width, scheme)
    assert sheet.evaluate("document.documentElement.scrollWidth") <= width
    outside = """edge => [...document.querySelectorAll(
        'h1, h2, h3, p, dl, figure, .tiles li, .draw svg, .talk li, .thought, .thought span, .judged li, text')]
        .map(e => [e.textContent.slice(0, 40), e.getBoundingClientRect()])
        .filter(([_, box]) => box.width && (box.right > edge + 1 || box.left < -1)).map(([text]) => text)"""
    assert sheet.evaluate(outside, width) == []


def test_the_scheme_follows_the_reader(page):
    light, dark = (
        page(scheme=s).evaluate("getComputedStyle(document.body).backgroundColor") for s in ("light", "dark")
    )
    assert light != dark
    assert sum(map(int, light[4:-1].split(","))) > 600 and sum(map(int, dark[4:-1].split(","))) < 150


def test_intervals_are_drawn_where_their_numbers_say(page):
    sheet = page()
    for claim, low, high in (("trunk learned copy", 6, 14), ("reasoning on copy", -15, -5)):
        row = sheet.locator(".forest tbody tr", has_text=claim).first
        zero = row.locator("line.zero").bounding_box()["x"]
        mark = row.locator("g.mark line").first.bounding_box()
        ticks = row.locator("xpath=ancestor::table").locator("tfoot text")
        places = {ticks.nth(i).text_content(): ticks.nth(i).bounding_box() for i in range(ticks.count())}
        centre = {text: box["x"] + box["width"] / 2 for text, box in places.items()}
        unit = (centre["+10"] - centre["0"]) / 10
        assert abs(mark["x"] - zero - low * unit) < 3 and abs(mark["x"] + mark["width"] - zero - high * unit) < 3, claim


def test_on_a_phone_a_claim_keeps_its_parts_below_each_other_and_its_roles(page):
    row = page(390).locator(".forest:not(.controls) tbody tr").first
    boxes = [row.locator(place).bounding_box() for place in ("th", ".verd", ".draw")]
    assert boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"] and boxes[2]["width"] > 250
    assert row.get_by_role("rowheader").count() == 1 and row.get_by_role("cell").count() == 6


def test_answers_with_markup_are_shown_as_they_were_given(page):
    sheet = page()
    assert sheet.locator(".said", has_text=sample.NASTY).count() == 4
    assert sheet.locator(".talk b, .talk script").count() == 0
    whole = sheet.locator(".talk details").first
    assert not whole.locator("xpath=text()").is_visible() or whole.get_attribute("open") is None
    whole.locator("summary").click()
    assert whole.get_attribute("open") is not None


def test_accuracies_are_drawn_where_their_numbers_say(page):
    sheet = page()
    table = sheet.locator(".controls")
    ticks = table.locator("tfoot text")
    boxes = {ticks.nth(i).text_content(): ticks.nth(i).bounding_box() for i in range(ticks.count())}
    centre = {text: box["x"] + box["width"] / 2 for text, box in boxes.items()}
    unit = (centre["100"] - centre["0"]) / 100
    for name, low, value, high in (("with thoughts", 80, 83, 86), ("trained without", 22, 25, 28)):
        row = table.locator("tbody tr", has_text=name).first
        bar, span = row.locator("rect").bounding_box(), row.locator(".span line").first.bounding_box()
        assert abs(bar["x"] - centre["0"]) < 3 and abs(bar["width"] - value * unit) < 3, name
        assert abs(span["x"] - centre["0"] - low * unit) < 3 and abs(span["width"] - (high - low) * unit) < 3, name
        rule = row.locator("line.zero").bounding_box()
        assert abs(rule["x"] - centre["0"] - 13 * unit) < 3, "the accuracy without thoughts"


def test_on_a_phone_a_control_keeps_its_numbers_named_below_each_other(page):
    sheet = page(390)
    row = sheet.locator(".controls tbody tr", has_text="shuffled")
    boxes = [row.locator(place).first.bounding_box() for place in ("th", "td.n", ".draw")]
    assert boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"] and boxes[2]["width"] > 250
    named = row.locator("td.n").evaluate_all("cells => cells.map(c => getComputedStyle(c, '::before').content)")
    assert all("none" not in name for name in named) and len(named) == 3
    first = sheet.locator(".controls tbody tr").first
    assert not first.locator(".empty").is_visible(), "with thoughts loses nothing of its own gain"


def test_models_are_drawn_where_their_bytes_and_answers_say(page):
    sheet = page()
    drawn = sheet.locator("svg.spots")
    ticks = drawn.locator("> text")
    boxes = {ticks.nth(i).text_content(): ticks.nth(i).bounding_box() for i in range(ticks.count())}
    up = {text: box["y"] + box["height"] / 2 for text, box in boxes.items()}
    unit = (up["0"] - up["100"]) / 100
    right = {text: box["x"] + box["width"] / 2 for text, box in boxes.items()}
    tenfold = (right["2 MB"] - right["1 MB"]) / 0.30103
    for name, size, low, share, high in (("ternary", 345e3, 88.7, 91.5, 93.7), ("same bytes", 338e3, 18.9, 22, 25.5)):
        spot = drawn.locator("svg.spot", has=sheet.locator("text", has_text=name))
        mark, span = spot.locator("circle").bounding_box(), spot.locator("line").first.bounding_box()
        centre = (mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2)
        assert abs(centre[0] - right["1 MB"] - math.log10(size / 1e6) * tenfold) < 3, name
        assert abs(centre[1] - up["0"] + share * unit) < 3, name
        assert abs(span["height"] - (high - low) * unit) < 3 and abs(span["y"] - up["0"] + high * unit) < 3, name


@pytest.mark.parametrize("width", [1280, 760, 390])
def test_names_of_models_lie_on_nothing(page, width):
    names = page(width).locator("svg.spot text")
    boxes = [names.nth(i).bounding_box() for i in range(names.count())]
    assert len(boxes) == 7
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            apart = one["x"] >= other["x"] + other["width"] or other["x"] >= one["x"] + one["width"]
            lower, upper = sorted((one["y"], other["y"]), reverse=True)
            assert apart or lower - upper > 10


def test_on_a_phone_a_model_keeps_its_numbers_named_and_what_is_missing_is_left_out(page):
    sheet = page(390)
    row = sheet.locator("#bitnet .measures tbody tr", has_text="int4, not trained").first
    boxes = [row.locator(place).first.bounding_box() for place in ("th", "td.n")]
    assert boxes[0]["y"] < boxes[1]["y"] and row.get_by_role("cell").count() == 4
    assert row.locator(".empty").count() == 1 and not row.locator(".empty").is_visible(), "it was not timed"
    named = row.locator("td.n").evaluate_all("cells => cells.map(c => getComputedStyle(c, '::before').content)")
    assert len(named) == 5 and all("none" not in name for name in named)
    timed = sheet.locator("#bitnet .measures tbody tr", has=sheet.locator("td.draw")).first
    assert timed.locator(".draw").bounding_box()["width"] > 250
    small = [sheet.locator("figure.small").nth(i).bounding_box() for i in range(2)]
    assert small[0]["y"] == small[1]["y"] and small[0]["x"] + small[0]["width"] <= small[1]["x"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_verdict_stands_above_its_numbers_and_can_be_read(page, scheme):
    sheet = page(scheme=scheme)
    judged, tiles = sheet.locator("#bitnet .judged"), sheet.locator("#bitnet .tiles")
    assert "10.3 times smaller; 97 % of the skills kept" in judged.text_content()
    below = judged.bounding_box()["y"] + judged.bounding_box()["height"]
    assert below <= tiles.bounding_box()["y"] and tiles.locator("li").count() == 4
    shades = tiles.locator("li").first.evaluate(
        "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e.querySelector('strong')).color]"
    )
    light, dark = (sum(map(int, shade[4:-1].split(","))) for shade in shades)
    assert abs(light - dark) > 400


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_thought_stands_back_behind_its_answer(page, scheme):
    sheet = page(scheme=scheme)
    card = sheet.locator("#quietstar .talk li", has_text="add 38 25")
    asked, thought, said = (card.locator(place).bounding_box() for place in (".asked", ".thought", ".said"))
    assert asked["y"] + asked["height"] <= thought["y"] and thought["y"] + thought["height"] <= said["y"]
    colours = [card.locator(place).evaluate("e => getComputedStyle(e).color") for place in (".thought", ".said")]
    assert colours[0] != colours[1]
    lines = [card.locator(".thought li").nth(i).bounding_box() for i in range(3)]
    assert card.locator(".thought li").count() == 3 and lines[0]["y"] < lines[1]["y"] < lines[2]["y"]


def test_every_link_leads_to_a_heading(page):
    sheet = page()
    links = sheet.locator("nav a")
    assert links.count() == 10
    for place in range(links.count()):
        target = links.nth(place).get_attribute("href")
        assert sheet.locator(f"{target} h2").first.text_content(), target
