"""The page, in the system's Chromium: a hidden key asked for in a long text, and what is seen."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")

from serving import Served, serving, until  # noqa: E402
from tidaldecode.cli.demo_text import hide_key  # noqa: E402

# A folder for pictures of the page, as docs/ has them.
PICTURES = os.environ.get("PAGE_PICTURES")
NUM_TOKENS = 16000
WAIT_MS = 120_000


@pytest.fixture(scope="module")
def served(demo_model: Path) -> Iterator[Served]:
    engine = {"max_seq_len": 20000, "max_batch_size": 2, "attention": "tidal", "num_threads": 2}
    with serving(demo_model, engine=engine) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium (Debian's package)")
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"{chromium} does not start: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


class Page:
    """A page with all that it has complained about."""

    def __init__(self, browser: Any, served: Served, **options: Any) -> None:
        self.context = browser.new_context(
            **({"viewport": {"width": 1280, "height": 800}} | options)
        )
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.bodies: list[str] = []  # that answer_with() has answered
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._look)
        self._url = served.url
        self.page.goto(served.url + "/")
        self.page.get_by_label("Question").wait_for()

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _look(self, request: Any) -> None:
        if not request.url.startswith((self._url, "data:")):
            self.complaints.append(f"asks for {request.url}")

    def open(self, path: Path) -> None:
        self.page.set_input_files("input[type=file]", path)
        self.page.locator(".document strong", has_text=path.name).wait_for()

    def ask(self, question: str) -> None:
        box = self.page.get_by_label("Question")
        box.fill(question)
        box.press("Enter")

    def wait(self, state: str, index: int = -1) -> Any:
        run = self.page.locator(f".run[data-state={state}]")
        run = run.last if index < 0 else run.nth(index)
        run.wait_for(timeout=WAIT_MS)
        return run

    def answer_with(
        self, text: str, *extras: Any, is_whole: bool = True, reasoning: str = ""
    ) -> None:
        """Answers whatever is asked from now on in the server's place."""
        chunks: list[Any] = [{"choices": [], "tidaldecode": extra} for extra in extras]
        deltas = [{"reasoning_content": reasoning}] * bool(reasoning) + [{"content": text}]
        chunks += [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        body += "data: [DONE]\n\n" if is_whole else ""
        headers = {"content-type": "text/event-stream"}

        def answer(route: Any) -> None:
            self.bodies.append(route.request.post_data)
            route.fulfill(body=body, headers=headers)

        self.page.unroute("**/v1/chat/completions")
        self.page.route("**/v1/chat/completions", answer)

    def picture(self, name: str) -> None:
        if PICTURES:
            self.page.screenshot(path=f"{PICTURES}/{name}.png")


@pytest.fixture
def page(browser: Any, served: Served, request: pytest.FixtureRequest) -> Iterator[Page]:
    page = Page(browser, served, **getattr(request, "param", {}))
    yield page
    page.context.close()
    assert not page.complaints


@pytest.fixture(scope="module")
def book(served: Served, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A text file that hides a key; the question for it; the answer."""
    tokenizer = served.decoder._frontend._tokenizer
    prompt = hide_key(tokenizer.encode, NUM_TOKENS, 6)
    text = tokenizer.decode(prompt.prompt_ids).split("\nQuestion:")[0].strip()
    path = tmp_path_factory.mktemp("book") / "manual.txt"
    path.write_text(text)
    return path, f"What is the special magic number for {prompt.key}?", prompt.number


@pytest.fixture(scope="module")
def short_book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("short") / "short.txt"
    path.write_text("The harbour opens at six. 😀 The gates are blue.\n" * 40)
    return path


def figures(run: Any) -> dict[str, str]:
    names, values = run.locator("dt").all_inner_texts(), run.locator("dd").all_inner_texts()
    return dict(zip(names, values, strict=True))


def warmths(page: Page) -> list[float]:
    """How far each bin of the map's last column is from its background, 0 to 1."""
    return page.page.evaluate(
        """() => {
            const canvas = document.querySelector(".minimap");
            const style = getComputedStyle(canvas);
            const { width, height } = canvas;
            const strip = canvas.getContext("2d").getImageData(width - 3, 0, 1, height).data;
            const paint = document.createElement("canvas")
                .getContext("2d", { willReadFrequently: true });
            paint.fillStyle = style.getPropertyValue("--map-cool");
            paint.fillRect(0, 0, 1, 1);
            paint.fillStyle = style.getPropertyValue("--map-warm");
            paint.fillRect(1, 0, 1, 1);
            const [cool, warm] = [0, 1].map((x) => [...paint.getImageData(x, 0, 1, 1).data]);
            const far = (a, b) => Math.hypot(...a.map((value, i) => value - b[i]));
            return [...Array(512).keys()].map((bin) => {
                const at = 4 * Math.floor(((bin + 0.5) / 512) * height);
                return far([...strip.slice(at, at + 4)], cool) / far(warm, cool);
            });
        }"""
    )


def test_a_hidden_key_is_found_and_its_bin_lights_up(page: Page, book: tuple[Path, str, str]):
    path, question, number = book
    page.open(path)
    page.picture("page-document")
    page.ask(question)
    page.wait("reading")
    page.page.locator("progress").wait_for()
    run = page.wait("done")
    assert run.locator(".answer").inner_text().strip() == number
    spans = page.page.locator(".text span")
    texts = spans.all_inner_texts()
    assert "".join(page.page.locator(".text span").all_text_contents()) == path.read_text()
    assert 450 < len(texts) <= 512
    holds = [i for i, text in enumerate(spans.all_text_contents()) if number in text]
    (of_key,) = holds
    levels = [int(level) for level in page.page.eval_on_selector_all(
        ".text span", "spans => spans.map((span) => span.dataset.level)")]  # fmt: skip
    assert levels[of_key] == 5 and sum(level >= 3 for level in levels) < len(levels) / 4
    warm = warmths(page)
    assert warm[of_key] > 0.9 and sum(each < 0.2 for each in warm) > 300
    said = figures(run)
    read, of = (
        int(word.replace(",", "")) for word in said["read a step"].split() if word[0].isdigit()
    )
    assert NUM_TOKENS - 200 < of < NUM_TOKENS + 200 and 0 < read < 0.52 * of
    assert said["first token"] != "– ms" and said["a token"] != "– ms"
    # The passage is among those most read, and a click leads to it.
    assert number in page.page.locator(".passages button").first.inner_text()
    page.page.locator(".passages button").first.click()
    page.page.locator(".text .reached", has_text=number).wait_for()
    assert spans.nth(of_key).evaluate("s => s.parentNode.scrollTop") > 0
    page.picture("page")


def test_the_time_a_token_is_the_engines_once_it_is_known(page: Page):
    run = {"reading": None, "askedAt": 1.0, "firstAt": 7.0, "lastAt": 7.0, "numPieces": 1}
    ours = {"decode_tokens_per_s": 250.0}
    usage = {"completion_tokens": 6, "prompt_tokens_details": {}, "tidaldecode": ours}
    figure = """async (run) => (await import("/web/conversation.js")).figures(run).msPerToken"""
    assert page.page.evaluate(figure, run | {"usage": None}) is None
    assert page.page.evaluate(figure, run | {"usage": usage}) == 4.0


def test_two_modes_side_by_side(page: Page, book: tuple[Path, str, str]):
    path, question, number = book
    page.open(path)
    page.page.get_by_label("Compare with").select_option("full")
    page.ask(question)
    tidal, dense = page.wait("done", 0), page.wait("done", 1)
    assert tidal.get_attribute("data-mode") == "tidal"
    assert dense.get_attribute("data-mode") == "full"
    boxes = [run.bounding_box() for run in (tidal, dense)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    assert all(number in run.locator(".answer").inner_text() for run in (tidal, dense))

    def read(run: Any) -> int:
        return int(figures(run)["read a step"].split()[0].replace(",", ""))

    assert read(dense) > 15000 and read(tidal) < 0.52 * read(dense)
    page.picture("page-compare")
    page.page.get_by_label("Verified", exact=True).check()
    page.page.get_by_role("button", name="Retry").click()
    verified = page.page.locator(".run[data-mode=verified][data-state=done]")
    verified.wait_for(timeout=WAIT_MS)
    assert figures(verified)["drafts kept"].endswith("%")
    assert number in verified.locator(".answer").inner_text()


@pytest.mark.parametrize("how", ["key", "button"])
def test_stop(page: Page, served: Served, book: tuple[Path, str, str], tmp_path: Path, how: str):
    other = tmp_path / "other.txt"
    other.write_text(f"Another beginning, {how}. {book[0].read_text()}")  # the cache has it not
    page.open(other)
    page.ask(book[1])
    page.wait("reading")
    if how == "key":
        page.page.keyboard.press("Escape")
    else:
        page.page.get_by_role("button", name="Stop").click()
    page.wait("stopped")
    until(served.is_idle)
    page.page.get_by_role("button", name="Ask").wait_for()


def test_edit_retry_copy_and_keys(page: Page, short_book: Path):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.open(short_book)
    page.page.get_by_text("Settings").click()
    page.page.get_by_label("temperature").fill("0")
    page.page.get_by_label("longest answer").fill("6")
    page.page.get_by_text("Settings").click()
    page.ask("Why?")
    page.wait("done")
    box = page.page.get_by_label("Question")
    assert box.input_value() == ""
    box.press("ArrowUp")
    assert box.input_value() == "Why?" and page.page.locator(".turn").count() == 0
    page.page.locator("h1").click()
    page.page.keyboard.press("/")
    assert box.evaluate("box => box === document.activeElement")
    box.fill("When does the harbour open?")
    box.press("Enter")
    page.wait("done")
    first = page.page.locator(".answer").inner_text()
    page.page.get_by_role("button", name="Copy").click()
    page.page.get_by_role("button", name="Copied").wait_for()
    assert page.page.evaluate("navigator.clipboard.readText()").strip() == first.strip()
    page.page.get_by_role("button", name="Retry").click()
    page.page.wait_for_timeout(300)  # the answer that was there has gone
    page.page.locator(".run[data-state=done]").wait_for(timeout=WAIT_MS)
    assert page.page.locator(".answer").inner_text() == first
    page.ask("And then?")
    page.page.locator(".turn").nth(1).locator(".run[data-state=done]").wait_for(timeout=WAIT_MS)
    page.page.get_by_role("button", name="Edit").first.click()
    assert box.input_value() == "When does the harbour open?"
    assert page.page.locator(".turn").count() == 0
    joined = "".join(page.page.locator(".text").all_text_contents())
    assert joined == short_book.read_text()


def test_signs_beyond_two_bytes_keep_their_places(page: Page, short_book: Path):
    page.open(short_book)
    page.page.get_by_text("Settings").click()
    page.page.get_by_label("longest answer").fill("4")
    page.ask("When?")
    page.wait("done")
    texts = page.page.locator(".text span").all_text_contents()
    assert "".join(texts) == short_book.read_text()
    assert not any("\ufffd" in text for text in texts)


def test_markup_of_an_answer_does_nothing(page: Page):
    """An answer is anybody's text: a document can make the model say what it likes."""
    evil = (
        "**bold** <img src=x onerror=alert(1)><script>alert(2)</script> [a](javascript:alert(3)) "
        "![seen](http://example.com/?secret) [b](http://example.com/) <a name=body>c</a>"
    )
    page.answer_with(evil)
    page.page.on("dialog", lambda dialog: page.complaints.append(dialog.message))
    page.ask(evil)
    page.wait("done")
    answer = page.page.locator(".answer")
    assert answer.locator("strong").inner_text() == "bold"
    assert answer.locator("script, img, [name]").count() == 0
    assert "javascript:" not in answer.inner_html()
    assert "<script>" in answer.inner_text() and "![seen]" in answer.inner_text()
    link = answer.get_by_role("link", name="b", exact=True)
    assert link.get_attribute("target") == "_blank"
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert page.page.locator(".question p").inner_text() == evil


def test_a_document_and_its_name_are_text(page: Page, tmp_path: Path):
    text = "<img src=x onerror=alert(1)>\u202e<script>alert(2)</script>\n**no bold**"
    path = tmp_path / "<img src=x onerror=alert(3)>.txt"
    path.write_text(text)
    page.page.on("dialog", lambda dialog: page.complaints.append(dialog.message))
    page.open(path)
    assert page.page.locator(".text").text_content() == text
    assert page.page.locator(".document img, .document script").count() == 0


def test_an_answer_that_breaks_off_is_said_and_left_out_of_the_next(page: Page):
    page.answer_with("half an ans", is_whole=False)
    page.ask("First?")
    run = page.wait("failed")
    assert "ended before" in run.get_by_role("alert").inner_text()
    assert run.locator(".answer").inner_text() == "half an ans"
    page.page.get_by_role("button", name="Retry").wait_for()
    page.answer_with("", is_whole=False)
    page.page.get_by_role("button", name="Retry").click()
    page.wait("failed")
    page.answer_with("whole")
    page.ask("Second?")
    page.wait("done")
    asked = json.loads(page.bodies[-1])["messages"]
    assert asked == [{"role": "user", "content": "Second?"}]


def test_reasoning_is_shown_apart_and_not_sent_again(page: Page):
    page.answer_with("whole", reasoning="<b>first</b> this")
    page.ask("First?")
    run = page.wait("done")
    assert run.locator(".answer").inner_text().strip() == "whole"
    run.get_by_text("reasoning").click()
    assert "<b>first</b> this" in run.locator(".reasoning").inner_text()
    page.ask("Second?")
    page.page.locator(".turn").nth(1).locator(".run[data-state=done]").wait_for()
    contents = [each["content"] for each in json.loads(page.bodies[-1])["messages"]]
    assert contents == ["First?", "whole", "Second?"]


def test_a_server_that_has_gone_is_said(page: Page):
    page.page.route("**/v1/chat/completions", lambda route: route.abort())
    page.ask("Hello")
    assert page.wait("failed").get_by_role("alert").inner_text()
    assert all("Failed to load" in complaint for complaint in page.complaints)
    page.complaints.clear()
    page.page.get_by_role("button", name="Ask").wait_for()


def test_two_retries_at_once_are_one(page: Page, served: Served, short_book: Path):
    page.open(short_book)
    page.page.get_by_text("Settings").click()
    page.page.get_by_label("longest answer").fill("4")
    page.ask("Why?")
    page.wait("done")
    whole: list[str] = []
    page.page.on("requestfinished", lambda request: whole.append(request.url))
    page.page.get_by_role("button", name="Retry").evaluate("it => { it.click(); it.click(); }")
    page.page.wait_for_timeout(300)  # the answer that was there has gone
    page.wait("done")
    page.page.get_by_role("button", name="Ask").wait_for()
    until(served.is_idle)
    page.page.wait_for_timeout(300)
    assert len(whole) == 1


def test_a_book_of_a_megabyte_is_shown_and_refused_by_the_server(page: Page, tmp_path: Path):
    path = tmp_path / "long.txt"
    path.write_text("The harbour opens at six, and the gates are blue.\n" * 21_000)
    began = time.monotonic()
    page.open(path)
    page.ask("When?")
    run = page.wait("failed")
    assert time.monotonic() - began < 20
    assert "tokens" in run.get_by_role("alert").inner_text()
    assert all("400" in complaint for complaint in page.complaints)
    page.complaints.clear()


def test_without_a_document_only_what_is_read_most_is_hot(page: Page):
    edges = list(range(0, 22, 2))
    where = {"prompt_tokens": 20, "kv_bytes_per_token": 1, "edges": edges}
    where |= {"messages": [0] * 11, "offsets": edges}
    layer = {"layer": 2, "sets": 1, "bins": [2, 0, 0, 1, 0, 0, 0, 2, 0, 0], "answer": 0}
    selection = {"index": 0, "tokens": 1, "layers": [layer]}
    page.answer_with("a", {"selection_map": where}, {"selection": selection})
    page.ask("Hello")
    page.wait("done")
    page.page.wait_for_timeout(200)  # the newest is drawn
    warm = [round(each, 1) for each in warmths(page)[25::51]][:10]
    assert warm[7] == 1.0 and warm[0] == warm[1] == warm[2] == 0 and 0.5 < warm[3] < 0.9


def test_errors_are_shown(page: Page, tmp_path: Path):
    page.page.get_by_text("Settings").click()
    page.page.get_by_label("longest answer").fill("999999")
    page.ask("Hello")
    run = page.wait("failed")
    assert "20000" in run.get_by_role("alert").inner_text().replace(",", "")
    assert all("400" in complaint for complaint in page.complaints)
    page.complaints.clear()
    binary = tmp_path / "picture.txt"
    binary.write_bytes(b"\xff\xd8\xff\x00")
    page.page.set_input_files("input[type=file]", binary)
    page.page.get_by_text("picture.txt is no text").wait_for()


def test_a_dropped_file_is_opened(page: Page):
    page.page.evaluate("""() => {
        const data = new DataTransfer();
        data.items.add(new File(["A text of its own."], "dropped.txt", {type: "text/plain"}));
        const drop = new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
        document.body.dispatchEvent(drop);
    }""")
    page.page.locator(".document strong", has_text="dropped.txt").wait_for()
    assert page.page.locator(".text").inner_text() == "A text of its own."


@pytest.mark.parametrize("page", [{"color_scheme": "dark"}], indirect=True)
def test_dark_mode_follows_the_system_and_is_kept(page: Page):
    back = "getComputedStyle(document.body).backgroundColor"
    assert page.page.evaluate("document.documentElement.dataset.theme") == "dark"
    dark = page.page.evaluate(back)
    page.page.get_by_role("button", name="Dark mode").click()
    page.page.locator("html[data-theme=light]").wait_for()
    assert page.page.evaluate(back) != dark
    page.page.reload()
    page.page.get_by_label("Question").wait_for()
    assert page.page.evaluate("document.documentElement.dataset.theme") == "light"


@pytest.mark.parametrize("page", [{"viewport": {"width": 360, "height": 740}}], indirect=True)
def test_a_phone_shows_all_of_it(page: Page, book: tuple[Path, str, str]):
    path, question, number = book
    page.open(path)
    page.ask(question)
    assert number in page.wait("done").locator(".answer").inner_text()
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 360
    for each in (".minimap", ".ask textarea", ".run.shown"):
        box = page.page.locator(each).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] > 30, each
    page.picture("page-phone")


def test_a_page_waits_for_the_model(demo_model: Path, browser: Any):
    served = Served(demo_model, {}, {})
    make, goes = served.make, threading.Event()

    def slowly(progress: Any) -> Any:
        goes.wait(30)
        return make(progress)

    served.make = slowly
    threading.Thread(target=served.start).start()
    until(lambda: served.run.address)
    page = Page(browser, served)
    page.page.get_by_text("the model is being loaded").wait_for()
    goes.set()
    page.page.get_by_text("tidal-demo").wait_for()
    assert page.page.get_by_role("alert").count() == 0
    assert all("503" in complaint for complaint in page.complaints)
    page.context.close()
    served.end()


def test_a_browser_is_asked_for_the_key(demo_model: Path, browser: Any):
    with serving(demo_model, api_keys=("first",)) as served:
        for auth in (None, ("", "second")):
            refused = httpx.get(served.url + "/", auth=auth)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith("Basic ")
        assert httpx.get(served.url + "/", headers={"authorization": "Basic !"}).status_code == 401
        assert httpx.get(served.url + "/", auth=("", "first")).status_code == 200
        credentials = {"username": "", "password": "first"}
        page = Page(browser, served, http_credentials=credentials)
        page.page.get_by_text("tidal-demo").wait_for()
        page.page.get_by_text("Settings").click()
        page.page.get_by_label("longest answer").fill("4")
        page.ask("Hello")
        page.wait("done")
        page.context.close()
