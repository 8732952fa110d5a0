"""The page at /, clicked through in a real browser against a real server over the embedded model."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from abmll.meanings import normalized
from clients.http import Client
from tests.clients.conftest import Keyed

CHROMIUM = Path("/usr/bin/chromium")
_QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
QUESTION, OPTIONS = "could you dim the lamp in the bedroom", ("lights", "music", "alarm")
PHONE = {"width": 375, "height": 740}
Open = Callable[..., Page]

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="there is no chromium; on Debian: apt install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=_QUIET)
        expect.set_options(timeout=20_000)
        yield started
        started.close()


class Held:
    """Requests of a page to addresses like ``url``, which get no reply until a test gives one."""

    def __init__(self, page: Page, url: str, method: str = "GET") -> None:
        self._page, self._routes = page, list[Route]()
        page.route(
            url, lambda route: self._routes.append(route) if route.request.method == method else route.fallback()
        )

    def next(self) -> Route:
        """Returns one, as soon as it has been sent."""
        deadline = time.monotonic() + 20
        while not self._routes and time.monotonic() < deadline:
            self._page.wait_for_timeout(20)  # the page's requests are heard of while something is waited for
        assert self._routes, "the page sent no such request"
        return self._routes.pop()


@pytest.fixture
def visit(browser: Browser, keyed: Keyed) -> Iterator[Open]:
    """Opens views, each in a browser that knows nothing; at the end there must have been no error in the scripts."""
    faults: list[str] = []
    pages: list[Page] = []

    def said(kind: str, text: str) -> None:
        # A refused request is no fault of the page's.
        if kind == "error" and not text.startswith("Failed to load resource"):
            faults.append(text)

    def open_view(view: str, *, key: str | None = keyed.owner, forbidden: str = "", **options: Any) -> Page:
        page = browser.new_context(**options).new_page()
        pages.append(page)
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: said(message.type, message.text))
        if key is not None:
            page.add_init_script(f"sessionStorage.setItem('abmll-key', '{key}')")
        if forbidden:
            thrown = "get() { throw new DOMException('forbidden', 'SecurityError'); }"
            page.add_init_script(f"Object.defineProperty(window, '{forbidden}', {{ {thrown} }})")
        page.goto(f"{keyed.url}/#/{view}")
        return page

    yield open_view
    for page in pages:
        page.context.close()
    assert not faults


@pytest.fixture(scope="module")
def home(keyed: Keyed) -> Iterator[str]:
    """A task that is taught, with two versions and an answer that was judged."""
    rows = [{"prompt": f"{word} the lamp", "options": OPTIONS, "answer": "lights"} for word in ("dim", "light")]
    with Client(keyed.url, key=keyed.owner) as client:
        for _ in range(2):
            client.wait(client.adapt("home", rows, steps=1), poll=0.05)
        client.feedback(client.generate(QUESTION, task="home", options=OPTIONS), answer="lights")
        yield "home"
        client.delete_task("home")


def ask(page: Page, prompt: str = QUESTION, options: tuple[str, ...] = OPTIONS) -> None:
    page.get_by_label("Question", exact=True).fill(prompt)
    for option in options:
        page.get_by_role("button", name="Add an answer").click()
        page.locator(".options input").last.fill(option)
    page.get_by_role("button", name="Ask", exact=True).click()


def barriers(page: Page) -> list[str]:
    """What axe finds grave in the page as it stands, in light and in dark."""
    usual = {"resultTypes": ["violations"]}
    found: list[Any] = Axe().run(page, options=usual).response["violations"]
    page.emulate_media(color_scheme="dark")
    found += Axe().run(page, options=usual | {"runOnly": ["cat.color"]}).response["violations"]
    page.emulate_media(color_scheme="light")
    grave = [rule for rule in found if rule["impact"] in ("serious", "critical")]
    return [f"{rule['id']}: {rule['nodes'][0]['html']}" for rule in grave]


def test_a_page_without_a_key_asks_for_one_and_keeps_it_in_its_tab_alone(visit: Open, keyed: Keyed) -> None:
    page = visit("ask", key=None)
    dialog = page.get_by_role("dialog", name="This server asks for a key")
    dialog.get_by_label("API key").fill("abmll_nonsense")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("unknown or revoked")
    assert barriers(page) == []
    dialog.get_by_label("API key").fill(keyed.owner)
    dialog.get_by_role("button", name="Use this key").click()
    expect(dialog).to_be_hidden()
    ask(page)
    expect(page.get_by_role("heading", name="Was this right?")).to_be_visible()
    assert keyed.owner not in page.url
    assert page.evaluate("Object.keys(localStorage).length") == 0
    page.get_by_role("button", name="Forget the key").click()
    page.wait_for_function("Object.keys(sessionStorage).length === 0")
    expect(page.locator(".result")).not_to_contain_text(QUESTION)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("alert")).to_contain_text("asks for a key, and none was given")


def test_a_key_that_cannot_be_sent_is_asked_for_again_and_not_kept(visit: Open, keyed: Keyed) -> None:
    page = visit("tasks", key=None)
    dialog = page.get_by_role("dialog", name="This server asks for a key")
    for key in ("ключ", f"{keyed.owner}\u200b"):
        dialog.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("holds characters")
    assert page.evaluate("Object.keys(sessionStorage).length") == 0
    dialog.get_by_label("API key").fill(keyed.owner)
    page.keyboard.press("Enter")
    expect(page.get_by_role("table")).to_contain_text("global")
    expect(visit("ask", key="ключ").get_by_role("dialog")).to_be_visible()  # however it came there


def test_without_storage_the_key_holds_until_the_page_is_left(visit: Open, keyed: Keyed) -> None:
    page = visit("tasks", key=None, forbidden="sessionStorage")
    page.get_by_label("API key").fill(keyed.owner)
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("table")).to_contain_text("global")
    page.get_by_role("link", name="Health").click()
    expect(page.locator(".lamps")).to_contain_text("Answers questionsyes")


def test_an_address_that_names_no_task_shows_them_all(visit: Open) -> None:
    expect(visit("tasks/%").get_by_role("table")).to_contain_text("global")


def test_a_question_is_asked_and_judged_with_the_keyboard_alone(visit: Open) -> None:
    page = visit("ask")
    expect(page.locator("select").first).to_contain_text("global")
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type(QUESTION)
    for option in OPTIONS:
        expect(page.locator(":focus")).to_be_editable()
        for _ in range(2 if page.locator(".options input").count() else 1):  # past the cross of the last answer
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.keyboard.type(option)
    asking = page.get_by_role("button", name="Ask", exact=True)
    asking.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status").first).to_contain_text("Confidence")
    expect(asking).to_be_focused()
    yes = page.get_by_role("button", name="Yes")
    for _ in range(20):
        page.keyboard.press("Tab")
        if yes.evaluate("element => element === document.activeElement"):
            break
    page.keyboard.press("Enter")
    expect(page.get_by_text("Noted: the answer was right")).to_be_focused()


def test_an_answer_shows_what_the_server_said(visit: Open, keyed: Keyed) -> None:
    page = visit("ask")
    ask(page)
    bars = page.locator(".bars li")
    expect(bars).to_have_count(3)
    with Client(keyed.url, key=keyed.owner) as client:
        answer = client.generate(QUESTION, options=OPTIONS)
    assert answer.probabilities is not None
    for bar, option, probability in zip(bars.all(), OPTIONS, answer.probabilities, strict=True):
        expect(bar).to_contain_text(option)
        expect(bar).to_contain_text(f"{100 * probability:.1f}")
        expect(bar.locator(".within.yes")).to_have_count(int(option in (answer.prediction_set or ())))
    for value in (answer.uncertainty.epistemic, answer.uncertainty.aleatoric):
        expect(page.locator(".parts")).to_contain_text(f"{value:.3f}")
    expect(page.locator(".chip")).to_contain_text("Calibrated" if answer.calibrated else "Not calibrated")

    page.get_by_role("button", name="No", exact=True).click()
    page.get_by_label("Which was right?").select_option(next(o for o in OPTIONS if o != answer.answer))
    page.get_by_role("button", name="This was right").click()
    expect(page.get_by_text("Noted: the answer was wrong")).to_be_visible()

    page.get_by_text("How to answer").click()
    page.get_by_label("Abstain below").press_sequentially("-")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("Abstain below: this is not a number")
    expect(page.get_by_label("Abstain below")).to_be_focused()
    page.get_by_label("Abstain below").fill("99.9")
    page.get_by_label("Draws").fill("1")
    page.get_by_label("Answer 3", exact=True).fill(" alarm")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("heading", name="No answer")).to_be_visible()
    expect(page.locator(".reason")).to_contain_text("below the 99.9")
    expect(page.locator(".parts")).to_contain_text("one draw does not tell it")
    expect(page.locator(".result")).not_to_contain_text("±")
    expect(page.locator(".whisker")).to_have_count(0)
    assert barriers(page) == []

    told = Held(page, "**/feedback", method="POST")
    page.get_by_label("Which answer is right?").select_option(" alarm")
    page.get_by_role("button", name="This was right").click()
    expect(page.locator(".judge")).to_have_attribute("aria-busy", "true")
    page.get_by_label("Question", exact=True).focus()
    told.next().continue_()
    expect(page.get_by_text("Noted:  alarm is right")).to_be_visible()
    expect(page.get_by_label("Question", exact=True)).to_be_focused()


def test_a_mistake_is_told_where_it_was_made(visit: Open) -> None:
    page = visit("ask")
    ask(page, options=("lights", "lights"))
    expect(page.get_by_role("alert")).to_contain_text('The answer "lights" stands there twice')
    expect(page.get_by_label("Answer 2", exact=True)).to_be_focused()
    page.get_by_role("button", name="Remove answer 2").click()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("There is one answer to choose from")
    page.get_by_role("button", name="Remove answer 1").click()
    ask(page, prompt=" ", options=())
    expect(page.get_by_role("alert")).to_contain_text("Prompt is empty; give a question")
    expect(page.get_by_label("Question", exact=True)).to_be_focused()
    page.get_by_text("How to answer").click()
    for label, value, bounds in (("Abstain below", "150", "from 0 to 100"), ("Longest text", "5000", "from 1 to 512")):
        page.get_by_label(label).fill(value)
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.get_by_role("alert")).to_have_text(f"{label}: {value} is not {bounds}.")
        page.get_by_label(label).fill("10")


def test_a_share_that_is_not_all_is_never_shown_as_all(visit: Open) -> None:
    page = visit("ask")
    shown = page.evaluate(
        "import(new URL('web/figures.js', document.baseURI)).then(({percent, points, nats}) => "
        "[percent(0.99996), percent(1), percent(0.0004), percent(0), percent(0.996, 0), points(0.0004), nats(-1e-9)])"
    )
    assert [text.replace("\u202f", "") for text in shown] == [
        ">99.9%", "100.0%", "<0.1%", "0.0%", ">99%", "±<0.1", "0.000"
    ]  # fmt: skip


def test_a_version_is_that_of_its_task_and_a_task_that_is_gone_is_told(visit: Open, home: str) -> None:
    page = visit(f"ask?task={home}&version=1")
    task, version = page.get_by_label("Task", exact=True), page.get_by_label("Version", exact=True)
    expect(version).to_have_value("1")
    task.select_option("global")
    task.select_option(home)
    expect(version).to_contain_text("2")
    expect(version).to_have_value("")
    version.select_option("2")
    page.get_by_role("link", name="Tasks").click()
    with page.expect_response(f"**/tasks/{home}"):
        page.get_by_role("link", name="Ask", exact=True).click()
    expect(version).to_have_value("2")  # the same question goes on
    page.evaluate(f"location.hash = '#/ask?task={home}'")
    expect(version).to_have_value("")
    page.evaluate(f"location.hash = '#/ask?task={home}&version=9'")
    lacks = f"Task {home} has no version 9 that can be asked; choose another, or ask it as it is served."
    expect(page.get_by_role("alert")).to_have_text(lacks)
    expect(version).to_be_focused()
    expect(version).to_have_value("")
    held = Held(page, "**/tasks")
    page.evaluate("location.hash = '#/ask?task=nowhere'")
    expect(task).to_have_value("nowhere")
    page.get_by_label("Question", exact=True).focus()
    held.next().continue_()
    expect(page.get_by_role("alert")).to_have_text("There is no task nowhere; choose another.")
    expect(page.get_by_label("Question", exact=True)).to_be_focused()


def test_who_asks_before_the_tasks_are_listed_asks_the_one_the_link_names(visit: Open, home: str) -> None:
    page = visit("ask")
    ask(page)
    expect(page.get_by_text("global version")).to_be_visible()
    held = Held(page, "**/tasks")
    page.evaluate(f"location.hash = '#/ask?task={home}&version=1'")
    expect(page.get_by_label("Task", exact=True)).to_have_value(home)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_text(f"{home} version 1")).to_be_visible()
    held.next().continue_()
    version = page.get_by_label("Version", exact=True)
    expect(version).to_contain_text("2")
    expect(version).to_have_value("1")


def test_a_late_reply_changes_nothing_on_another_page(visit: Open, home: str) -> None:
    page = visit("tasks")
    nowhere, reliability = Held(page, "**/tasks/nowhere"), Held(page, "**/reliability?version=1")
    page.evaluate("location.hash = '#/tasks/nowhere'")
    expect(page.get_by_text("Reading the task.")).to_be_visible()
    page.evaluate(f"location.hash = '#/tasks/{home}'")
    expect(page.get_by_role("heading", name="By feedback: 1 answer")).to_be_visible()
    with page.expect_response("**/tasks/nowhere"):
        nowhere.next().continue_()
    expect(page.get_by_role("heading", name="By feedback: 1 answer")).to_be_visible()
    page.get_by_label("Version", exact=True).last.select_option("1")
    expect(page.get_by_text("Reading how far version 1 held")).to_be_visible()
    expect(page.get_by_role("heading", name="By feedback")).to_have_count(0)  # no curves under another's number
    page.get_by_label("Version", exact=True).last.select_option("2")
    expect(page.get_by_role("heading", name="By feedback: 1 answer")).to_be_visible()
    with page.expect_response("**/reliability?version=1"):
        reliability.next().continue_()
    expect(page.get_by_role("heading", name="By feedback: 1 answer")).to_be_visible()
    page.evaluate("location.hash = '#/ask'")
    task = page.get_by_label("Task", exact=True)
    expect(task).to_contain_text(home)
    described = Held(page, f"**/tasks/{home}")
    task.select_option(home)
    task.select_option("global")
    with page.expect_response(f"**/tasks/{home}"):
        described.next().fulfill(status=500, body="out of order")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_free_text_comes_token_by_token_and_is_then_coloured(visit: Open, keyed: Keyed) -> None:
    page = visit("ask")
    page.get_by_text("How to answer").click()
    page.get_by_label("Longest text").fill("512")
    # By the page itself: a test that is paused would come too late.
    page.evaluate(
        "new MutationObserver((_, seen) => {"
        "  if (!/\\w/.test(document.querySelector('.streamed')?.textContent ?? '')) return;"
        "  seen.disconnect();"
        "  [...document.querySelectorAll('button')].find(({ textContent }) => textContent === 'Stop').click();"
        "}).observe(document.body, { childList: true, subtree: true, characterData: true })"
    )
    ask(page, "what is the capital of france", ())
    expect(page.get_by_text("It ended here")).to_be_visible()
    expect(page.locator(".streamed")).to_contain_text(re.compile(r"\w"))
    expect(page.locator(".tokens")).to_have_count(0)

    page.get_by_label("Longest text").fill("8")
    page.get_by_role("button", name="Ask", exact=True).click()
    tokens = page.locator(".token")
    expect(tokens).to_have_count(8)
    expect(page.locator(".cut")).to_contain_text("was cut at its longest length")
    expect(page.locator("#live")).to_contain_text("was cut at its longest length")
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(page.locator(".detail")).to_contain_text("likely · epistemic")
    tokens.nth(3).hover()
    page.keyboard.press("Enter")
    expect(tokens.nth(1)).to_have_class(re.compile("looked"))
    steps = tokens.evaluate_all("all => all.map(one => one.dataset.step)")
    tokens.first.click()
    page.locator(".tokens").select_text()
    with Client(keyed.url, key=keyed.owner) as client:
        answer = client.generate("what is the capital of france", max_tokens=8)
    assert page.evaluate("getSelection().toString()").split() == (answer.answer or "").split()
    page.get_by_label("Coloured by").select_option("epistemic")
    assert tokens.evaluate_all("all => all.map(one => one.dataset.step)") != steps
    page.get_by_text("Every token in a table").click()
    assert barriers(page) == []
    expect(page.get_by_role("region", name="The answer, token by token").get_by_role("row")).to_have_count(9)
    page.get_by_role("button", name="Yes").click()
    calibrated = page.locator(".chip").inner_text().startswith("Calibrated")
    counts = " It counts when global is judged." if calibrated else ""
    expect(page.locator(".noted")).to_have_text(f"Noted: the answer was right.{counts}")

    page.get_by_label("Draws").fill("1")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".detail")).to_contain_text("likely · uncertainty")  # of one draw its parts are not told
    expect(page.get_by_label("Coloured by").get_by_role("option")).to_have_text(["probability"])
    page.get_by_text("Every token in a table").click()
    expect(page.get_by_role("columnheader", name="Epistemic, nats")).to_have_count(0)
    assert barriers(page) == []


def test_a_task_is_taught_tried_rolled_back_and_deleted(visit: Open, keyed: Keyed, tmp_path: Path) -> None:
    said = [("dim the lamp", "lights"), ("play a song", "music"), ("too dark here", "lights"), ("more jazz", "music")]
    rows = [{"prompt": prompt, "options": ["lights", "music"], "answer": answer} for prompt, answer in said]
    file = tmp_path / "Kitchen.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    page = visit("teach")
    page.get_by_label("Or a file").set_input_files(file)
    expect(page.get_by_label("Name of the task")).to_have_value("kitchen")
    expect(page.get_by_label("Hold back")).to_have_value("1")
    expect(page.get_by_role("cell", name="held back")).to_have_count(1)
    page.get_by_role("button", name="Teach kitchen from 3 examples").click()
    expect(page.get_by_role("progressbar")).to_be_visible()
    heading = page.get_by_role("heading", name="kitchen, version 1")
    expect(heading).to_be_focused(timeout=60_000)
    expect(page.locator(".changes")).to_contain_text(re.compile(r"Right\d+.%\s*→"))
    expect(page.get_by_role("region", name="Before (global) and after").get_by_role("row")).to_have_count(2)
    assert barriers(page) == []
    page.get_by_role("button", name="Teach from all 4").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#live")).to_have_text("Cancelled.", timeout=30_000)
    with Client(keyed.url, key=keyed.owner) as client:
        client.wait(client.adapt("kitchen", rows, steps=1), poll=0.05)

        client.serve("kitchen", 1)
    page.get_by_label("Hold back").fill("0")
    page.get_by_role("button", name="Teach kitchen from 4 examples").click()
    expect(page.get_by_role("heading", name=re.compile("^kitchen, version"))).to_be_focused(timeout=60_000)
    expect(page.locator(".verdict")).to_contain_text("still answered by version 1")
    page.get_by_role("link", name="Ask it").click()
    expect(page.get_by_label("Version", exact=True)).not_to_have_value("")

    page.get_by_role("link", name="Tasks").click()
    expect(page.get_by_role("heading", name="Tasks")).to_be_focused()
    page.get_by_role("link", name="kitchen").click()
    page.get_by_label("One version").check()
    page.locator("[data-for=one] select").select_option("1")
    page.get_by_role("button", name="Apply").click()
    expect(page.get_by_role("row", name=re.compile("^1 answers 100"))).to_be_visible()
    page.get_by_label("Several").check()
    page.get_by_label("Version 2, %").fill("")
    page.get_by_label("Version 2, %").press_sequentially("-")
    page.get_by_role("button", name="Apply").click()
    expect(page.get_by_role("alert")).to_contain_text("Version 2, %: this is not a number")
    expect(page.get_by_label("Version 2, %")).to_be_focused()
    for shares, told in (((30, 30), "The shares add up to 60 %"), ((-5, 105), "-5 is not from 0 to 100")):
        for version, share in enumerate(shares, start=1):
            page.get_by_label(f"Version {version}, %").fill(str(share))
        page.get_by_role("button", name="Apply").click()
        expect(page.get_by_role("alert")).to_contain_text(told)
    for version, share in ((1, 0.4), (2, 99.6)):
        page.get_by_label(f"Version {version}, %").fill(str(share))
    page.get_by_role("button", name="Apply").click()
    expect(page.get_by_role("row", name=re.compile("^2 answers >.99"))).to_be_visible()
    expect(page.get_by_label("Version 1, %")).to_have_value("0.4")
    expect(page.get_by_role("button", name="Apply")).to_be_focused()
    only = page.get_by_label("A version that does not answer")
    expect(only).to_be_hidden()  # both answer
    page.get_by_label("One version").check()
    page.locator("[data-for=one] select").select_option("2")
    page.get_by_role("button", name="Apply").click()
    expect(only).to_have_value("1")
    page.get_by_role("button", name="Delete it").click()
    expect(page.get_by_role("heading", name="Delete version 1 of kitchen?")).to_be_visible()
    with Client(keyed.url, key=keyed.owner) as client:
        client.serve("kitchen", 1)  # somebody else, meanwhile
    page.get_by_role("button", name="Delete for good").click()
    expect(page.get_by_role("alert").filter(visible=True)).to_contain_text("answers")
    with Client(keyed.url, key=keyed.owner) as client:
        client.serve("kitchen", 2)
    page.get_by_role("button", name="Delete for good").click()
    expect(page.locator("#live")).to_have_text("Version 1 of kitchen is deleted.")
    expect(page.get_by_role("row", name=re.compile("^1 "))).to_have_count(0)
    expect(only).to_be_hidden()
    page.get_by_role("button", name="Delete kitchen").click()
    page.get_by_role("button", name="Keep it").click()
    page.get_by_role("button", name="Delete kitchen").click()
    assert barriers(page) == []
    held = Held(page, "**/tasks/kitchen", method="DELETE")
    page.get_by_role("button", name="Delete for good").click()
    expect(page.get_by_role("dialog")).to_contain_text("Deleting…")
    for _ in range(2):
        page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.evaluate("location.hash = '#/health'")
    expect(page.get_by_role("dialog")).to_be_hidden()
    held.next().fulfill(status=500, body="out of order")
    expect(page.get_by_role("dialog")).to_contain_text("500: out of order")
    page.keyboard.press("Escape")
    page.unroute("**/tasks/kitchen")
    page.evaluate("location.hash = '#/tasks/kitchen'")
    page.get_by_role("button", name="Delete kitchen").click()
    page.get_by_role("button", name="Delete for good").click()
    expect(page.get_by_role("heading", name="Tasks", exact=True)).to_be_visible()
    expect(page.get_by_role("table")).to_contain_text("global")
    expect(page.get_by_role("table")).not_to_contain_text("kitchen")


def test_each_line_that_is_no_example_is_named(visit: Open) -> None:
    page = visit("teach")
    page.get_by_role("button", name="Fill in twelve examples").click()
    expect(page.get_by_label("Hold back")).to_have_value("3")
    examples = page.get_by_label("Examples, 1 to 64")
    for text, faults in (
        ("a,b\nc,d", ["Line 1 the first line must name the columns"]),
        ('prompt,answer,options\n"a, b",x,x|y\nq,z,x|y\n,x,x|y\n', ["Line 3 answer \"z\"", "Line 4 prompt is missing"]),
        ('prompt;answer\n"two\nlines";x\nq;\n', ["Line 4 answer is missing"]),
        ('[{"prompt": "[p", "answer": "a"},\n\n{"prompt"},\n[]]', ["Line 3 is not", "Line 4 is not a JSON object"]),
        ('[{"prompt": "p", "answer": "a"},\n{"prompt": "q", "answer": "b"}', ["Line 2 the array is never closed"]),
        ('{"prompt": "p", "answer": "a"}\n{"prompt"\n[]', ["Line 2 is not JSON", "Line 3 is not a JSON object"]),
        ("prompt,answer\n" + "q,a\nr,b\n" * 40, ["Line 66 there are 80 examples; 64 are the most"]),
        ("prompt,answer\nq,a\nr,a\n", ["Line 2 all answers are the same"]),
        ("prompt,answer\nq,a,,\nlights on, please,b\n", ["Line 3 has 3 cells for 2 columns"]),
        (
            '{"question": "q", "choices": ["a", "b"], "answer": 1}\n{"prompt": "p", "Text": "q", "answer": "a"}',
            ["Line 1 'choices' is no key of an example; name it 'options'", "Line 2 'prompt' and 'Text' both hold"],
        ),
        ("question,Choices,answer\nq,a|b,a\nr,,b\n", ["Line 1 'Choices' is no column of examples; name it 'options'"]),
        ("prompt,label,answer\nq,,a\nr,1,b\n", ["Line 1 'label' and 'answer' both hold the answer; leave one"]),
    ):  # fmt: skip
        examples.fill(text)
        for fault in faults:
            expect(page.locator(".faults")).to_contain_text(fault)
        expect(page.locator(".faults li")).to_have_count(len(faults))
        expect(page.get_by_role("button", name="Teach")).to_be_disabled()


@pytest.mark.parametrize(
    "text",
    [
        '{"Text": "p", "label": 3}\n{"question": "q", "answer": 4, "options": null}',
        '[\n  {"text": "p", "label": "3"},\n  {"input": "q", "label": 4}\n]\n',
        "text,label,from; when\np,3,x\nq,4,y;z\n",
        "when\tlabel\tquestion\nx\t3\tp\ny\t4\tq\n",
    ],
)
def test_examples_are_understood_in_each_form(visit: Open, text: str) -> None:
    page = visit("teach")
    page.get_by_label("Examples, 1 to 64").fill(text)
    rows = page.get_by_role("region", name="2 examples to teach, 0 held back, options 3 | 4").get_by_role("row")
    expect(rows.nth(1)).to_contain_text("p3taught")
    expect(rows.nth(2)).to_contain_text("q4taught")


def test_examples_that_were_there_come_back(visit: Open) -> None:
    page = visit("teach")
    examples = page.get_by_label("Examples, 1 to 64")
    examples.fill("prompt,answer\nmine,a\nother,b\n")
    page.get_by_role("button", name="Fill in twelve examples").click()
    expect(examples).to_have_value(re.compile("lamp in the kitchen"))
    page.keyboard.press("Control+z")
    expect(examples).to_have_value(re.compile("mine"))


def test_a_file_is_read_as_utf_8_and_gives_the_task_a_name_unless_the_reader_did(visit: Open) -> None:
    page = visit("teach")
    name, examples = page.get_by_label("Name of the task"), page.get_by_label("Examples, 1 to 64")

    def give(file: str, encoding: str = "utf-8") -> None:
        content = "prompt,answer\nun café,à boire\nun croissant,à manger\n".encode(encoding)
        page.get_by_label("Or a file").set_input_files({"name": file, "mimeType": "text/csv", "buffer": content})

    give("Home.csv", "utf-8-sig")
    expect(page.get_by_role("button", name="Teach home from 2 examples")).to_be_visible()
    for encoding in ("cp1252", "utf-16"):
        give("Menu.csv", encoding)
        expect(page.get_by_role("alert")).to_have_text("Menu.csv is not UTF-8; save it as CSV UTF-8.")
        expect(examples).to_have_value(re.compile("^prompt.*café", re.DOTALL))
        expect(name).to_have_value("home")
        give("Other.csv")
        expect(name).to_have_value("other")
        expect(page.get_by_role("alert")).to_be_hidden()
        give("Home.csv")
        expect(name).to_have_value("home")
    name.fill("mine")
    expect(page.get_by_role("button", name="Teach mine from 2 examples")).to_be_visible()
    examples.fill("")
    give("Home.csv")
    expect(examples).to_have_value(re.compile("café"))
    expect(name).to_have_value("mine")
    examples.evaluate("area => { area.value = 'prompt,answer'; area.form.requestSubmit(); }")  # before it is read
    expect(page.get_by_role("button", name="Teach")).to_be_disabled()
    expect(page.locator(".progress, .trouble").filter(visible=True)).to_have_count(0)


def test_a_trial_judges_a_text_as_the_server_does_and_parts_no_question(visit: Open) -> None:
    texts = [
        "1.5", "15", "-5", "5", "+", "-", "a", "the", "The  Cat.", "cat", "caf\u00e9", "CAFE\u0301", "x < 3", "U.S.A.",
        "$5", "5$", "½ cup", "\ufeffno", "a\x1fb", "नमस्ते", "می\u200cخواهم", "don't", "snake_case", "...", "",
    ]  # fmt: skip
    prompts = ["p", "q", "p", "r", "s", "q"]
    found = visit("tasks").evaluate(
        """async ([texts, prompts]) => {
            const trial = await import(new URL("web/views/trial.js", document.baseURI));
            const rows = prompts.map((prompt, line) => ({ prompt, options: null, answer: "x".repeat(150 * line) }));
            const room = [];
            const generate = async (_, { max_tokens }) => { room.push(max_tokens); return { answer: "" }; };
            const { signal } = new AbortController();
            await trial.attempt({ call: (work) => work({ generate }) }, rows, { task: "t", signal });
            const parts = [1, 2, 3, 4, 5].map((count) => trial.holdBack(rows, count));
            const asked = (part) => part.map(({ prompt }) => prompt);
            return [texts.map(trial.normalized), room, parts.map(({ taught, held }) => [asked(taught), asked(held)])];
        }""",
        [texts, prompts],
    )
    assert found[0] == [normalized(text) for text in texts]
    assert all(min(150 * line + 1, 512) <= room <= 512 for line, room in enumerate(found[1]))
    for count, (taught, held) in enumerate(found[2], start=1):
        assert sorted(taught + held) == sorted(prompts)
        assert not set(taught) & set(held)
        assert count - 1 <= len(held) <= count


def test_a_count_to_hold_back_that_is_no_number_is_told(visit: Open) -> None:
    page = visit("teach")
    page.get_by_role("button", name="Fill in twelve examples").click()
    page.get_by_label("Hold back").select_text()
    page.get_by_label("Hold back").press_sequentially("-")
    page.get_by_role("button", name="Teach home from").click()
    expect(page.get_by_role("alert")).to_contain_text("Hold back to test: this is not a number")
    expect(page.get_by_label("Hold back")).to_be_focused()


def test_a_job_that_cannot_be_followed_is_said_to_run_on(visit: Open, keyed: Keyed) -> None:
    page = visit("teach")
    followed = Held(page, "**/adapt/*")
    page.get_by_role("button", name="Fill in twelve examples").click()
    page.get_by_label("Name of the task").fill("lost")
    page.get_by_label("Hold back").fill("0")
    page.get_by_role("button", name="Teach lost from 12 examples").click()
    held = followed.next()
    page.get_by_label("Hold back").focus()
    held.fulfill(status=500, body="out of order")
    expect(page.get_by_role("alert")).to_have_text(
        "The server replied 500: out of order. The job may run on; the list of tasks shows what comes of it."
    )
    expect(page.get_by_label("Hold back")).to_be_focused()
    with Client(keyed.url, key=keyed.owner) as client:
        client.cancel(client.jobs()[0].job)


def test_a_key_without_the_right_is_told_in_words(visit: Open, keyed: Keyed) -> None:
    page = visit("teach", key=keyed.reader)
    page.get_by_role("button", name="Fill in twelve examples").click()
    page.get_by_label("Hold back").fill("0")
    page.get_by_role("button", name="Teach home from 12 examples").click()
    expect(page.get_by_role("alert")).to_contain_text("lacks the right 'adapt'")


def test_how_far_a_confidence_held_is_drawn_and_written(visit: Open, home: str) -> None:
    page = visit(f"tasks/{home}")
    charts = page.get_by_role("img", name=re.compile("Said and right|Wrong, if only the surest"))
    expect(page.get_by_role("heading", name="By feedback: 1 answer")).to_be_visible()
    assert charts.count() >= 2
    page.get_by_text("The numbers").last.click()
    expect(page.get_by_role("region", name="Share of wrong answers").last.get_by_role("row")).to_have_count(2)
    page.get_by_label("Version", exact=True).last.select_option("1")
    expect(page.get_by_text("Nothing yet: none of its answers")).to_be_visible()


def test_a_temperature_is_fitted_to_the_feedback_shown_and_made_a_version(visit: Open, keyed: Keyed) -> None:
    rows = [{"prompt": f"{word} the lamp", "options": OPTIONS, "answer": "lights"} for word in ("dim", "light")]
    with Client(keyed.url, key=keyed.owner) as client:
        client.wait(client.adapt("judged", rows, steps=1), poll=0.05)
        client.feedback(client.generate("number 0", task="judged", options=OPTIONS), answer="lights")
        page = visit("tasks/judged")
        look = page.get_by_role("button", name="Show what it would change")
        look.click()
        expect(page.get_by_role("alert").filter(has_text="at least 20 are needed")).to_be_visible()
        for number in range(1, 20):
            answer = client.generate(f"number {number}", task="judged", options=OPTIONS)
            client.feedback(answer, answer=OPTIONS[number % 3])
        shown = client.recalibrate("judged")
        look.click()
        changes = page.locator(".changes")
        expect(changes).to_contain_text(f"{shown.temperature_before:.2f} → {shown.temperature_after:.2f}")
        expect(changes).to_contain_text(f"{shown.before.nll:.3f} → {shown.after.nll:.3f}")
        expect(page.get_by_text("From 20 judged answers")).to_be_focused()
        expect(page.get_by_role("alert").filter(has_text="needed")).to_be_hidden()
        assert barriers(page) == []
        client.feedback(client.generate("number 20", task="judged", options=OPTIONS), answer=OPTIONS[0])
        fitted = client.recalibrate("judged")
        sent: list[str] = []
        page.on("request", lambda request: sent.append(request.url))
        page.get_by_role("button", name="Make a version with it").dblclick()
        expect(page.get_by_role("row", name=re.compile("^2 answers, as the newest"))).to_be_visible()
        was, now = (f"temperature {one.temperature_after:.2f}, fitted to" for one in (shown, fitted))
        told = (
            f"Version 2 has {now} 21 judged answers, and the weights of version 1. "
            f"The feedback has changed: what was shown was {was} 20 judged answers."
        )
        expect(page.locator("#live")).to_have_text(told)
        expect(page.locator(".versions")).to_contain_text(told)
        assert sum(url.endswith("/recalibrate") for url in sent) == 1
        calibration: Any = client.task("judged").calibration
        assert calibration["by_shots"][0]["temperature"] == pytest.approx(fitted.temperature_after)
        client.delete_task("judged")


def test_health_tells_what_the_metrics_say(visit: Open) -> None:
    page = visit("health")
    expect(page.locator(".lamps")).to_contain_text("Answers questionsyes")
    figures = page.locator("dl.figures")
    expect(figures).to_contain_text("Enginetorch")
    expect(figures).to_contain_text("Engine upyes")


def test_health_goes_on_without_a_key_and_counts_a_late_reply_as_none(visit: Open) -> None:
    page = visit("health", key=None)
    page.evaluate("const late = AbortSignal.timeout; AbortSignal.timeout = (time) => late.call(AbortSignal, time / 10)")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("alert")).to_contain_text("asks for a key, and none was given")
    page.route("**/healthz", lambda _: None)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator(".lamps")).to_contain_text("Livesno answer")
    expect(page.locator(".lamps")).to_contain_text("Answers questionsyes")
    page.route("**/readyz", lambda _: None)
    expect(page.locator(".lamps")).to_contain_text("Answers questionsnot now")  # by itself, in three seconds
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_no_view_keeps_anybody_out(visit: Open, keyed: Keyed, home: str) -> None:
    page, long = visit("ask"), "n" * 64
    with Client(keyed.url, key=keyed.owner) as client:
        client.wait(client.adapt(long, [{"prompt": "dim", "answer": "lights"}], steps=1), poll=0.05)
    shown = {
        "ask": lambda: (ask(page), page.get_by_text("Was this right?").wait_for()),
        "teach": lambda: (
            page.get_by_role("button", name="Fill in twelve examples").click(),
            page.get_by_label("Examples, 1 to 64").press("End"),
        ),
        "tasks": lambda: page.get_by_role("table").wait_for(),
        f"tasks/{home}": lambda: page.get_by_text("By feedback").wait_for(),
        f"tasks/{long}": lambda: (
            page.get_by_role("heading", name="How far its confidence").wait_for(),
            page.get_by_role("button", name="Delete n").first.click(),
            page.keyboard.press("Escape"),
        ),
        f"ask?task={long}": lambda: (
            page.get_by_label("Task", exact=True).and_(page.locator(":focus, select")).wait_for(),
            page.get_by_role("button", name="Ask", exact=True).click(),
            page.get_by_text(f"{long} version 1").wait_for(),
        ),
        "health": lambda: page.get_by_text("Jobs cancelled").wait_for(),
    }
    for view, show in shown.items():
        page.evaluate(f"location.hash = '#/{view}'")
        show()
        assert barriers(page) == [], view
        page.set_viewport_size(PHONE)  # type: ignore[arg-type]
        sideways = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(sideways) <= 0, view
        page.set_viewport_size({"width": 1280, "height": 900})
    with Client(keyed.url, key=keyed.owner) as client:
        client.delete_task(long)


def test_the_theme_that_was_chosen_stays(visit: Open) -> None:
    page = visit("tasks", color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Dark").click()
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == dark
    expect(page.get_by_role("button", name="Dark")).to_have_attribute("aria-pressed", "true")


def test_the_page_runs_nothing_but_its_own_files(visit: Open, keyed: Keyed) -> None:
    policy = keyed.server.http.get("/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "require-trusted-types-for 'script'" in policy
    assert "unsafe" not in policy
    page = visit("ask")
    asked = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(asked) > 10
    assert all(name.startswith(keyed.url) for name in asked)
    for path in ("/web/..%2f..%2fserver%2fapp.py", "/web/nothing.js", "/js/..%2fcli.py"):
        assert keyed.server.http.get(path).status_code == 404
