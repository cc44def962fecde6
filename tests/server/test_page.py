"""The page in a real browser: live numbers, a prompt tried with the controls, keys, the keyboard, no errors. Skips without a browser.

``pytest -m picture`` takes docs/images/serve.png anew.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from server.server_helpers import SECONDS, Running, running

from engine import Decoder

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "serve.png"
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no browser: chromium and chromedriver are not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for one in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1180,1120"):
        options.add_argument(one)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(SECONDS)
    yield driver
    driver.quit()


class Page:
    def __init__(self, browser: Any, server: Running) -> None:
        self.browser = browser
        browser.get(server.url)

    def __getitem__(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    def until(self, condition: Any) -> None:
        WebDriverWait(self.browser, SECONDS, 0.05).until(lambda _: condition())

    def fill(self, **values: Any) -> None:
        for name, value in values.items():
            self[name].clear()
            self[name].send_keys(str(value))

    def tile(self, title: str) -> str:
        tiles = self.browser.find_elements(By.CLASS_NAME, "tile")
        return next(tile.find_element(By.TAG_NAME, "b").text for tile in tiles if tile.text.startswith(title))

    def until_run(self) -> str:
        self.until(lambda: self["run"].is_enabled() and self["run-state"].text != "waiting")
        return self["output"].get_attribute("textContent")

    def problems(self) -> list[str]:
        """What the browser complains of; a reply that is an error is none of it."""
        return [entry["message"] for entry in self.browser.get_log("browser") if "Failed to load resource" not in entry["message"]]


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Page]:
    one = Page(browser, server)
    one.until(lambda: one["state"].text == "ready")
    yield one
    assert one.problems() == []


def test_a_completion_with_controls(page: Page, alone: Decoder) -> None:
    prompt = "def read_csv(path):"
    page.fill(prompt=prompt, max_tokens=20, temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=5, repetition_penalty=1.1)
    page["run"].click()
    (output,) = alone.generate(prompt, max_new_tokens=20, temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=5, repetition_penalty=1.1)
    assert page.until_run() == prompt + output.text
    assert re.fullmatch(r"20 tokens, first after \d+ ms(, \d+ tok/s)?, ended by length", page["run-state"].text)


def test_by_the_keyboard_alone(page: Page, server: Running, alone: Decoder) -> None:
    page["prompt"].send_keys(Keys.CONTROL, "a")
    page["prompt"].send_keys("# one", Keys.ENTER)
    page.fill(max_tokens=5, temperature=0)
    page["temperature"].send_keys(Keys.CONTROL, Keys.ENTER)
    assert page.until_run() == "# one\n" + alone.generate("# one\n", max_new_tokens=5)[0].text
    page.fill(max_tokens=2000)
    with server.slow_steps(0.02):
        page["max_tokens"].send_keys(Keys.ENTER)
        page.until(lambda: "pieces" in page["run-state"].text)
        page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        page.until_run()
        assert "stopped" in page["run-state"].text
        server.until_idle()
    focusable = page.browser.find_elements(By.CSS_SELECTOR, "textarea, input, select, button, [tabindex]")
    assert all(one.accessible_name for one in focusable if one.is_displayed())


def test_chat_schema_and_errors(page: Page) -> None:
    page["kind"].send_keys("answer")
    page.fill(max_tokens=60, temperature=1, seed=3, schema='{"enum": ["debug", "release"]}')
    page["run"].click()
    assert page.until_run() in ('"debug"', '"release"')
    page.fill(schema="{")
    page["run"].click()
    page.until_run()
    assert "JSON" in page["output"].find_element(By.CLASS_NAME, "error").text
    page["schema"].clear()
    page.fill(max_tokens=5000)
    page["run"].click()
    page.until_run()
    assert "max_tokens is 5000" in page["output"].find_element(By.CLASS_NAME, "error").text


def test_text_is_text_and_no_markup(page: Page) -> None:
    page.fill(prompt="<img src=x onerror=alert(1)><b>", max_tokens=1, temperature=0)
    page["run"].click()
    assert page.until_run().startswith("<img src=x onerror=alert(1)><b>")
    assert not page["output"].find_elements(By.TAG_NAME, "img")


def test_numbers_are_live(page: Page, server: Running) -> None:
    stats = server.http.get("/stats").json()["decoder"]
    page.until(lambda: page.tile("KV cache") == "0.0 %" and page.tile("Batch") == "0")
    assert f"{stats['num_blocks']} blocks" in page["tiles"].text
    page.fill(prompt="x = ", max_tokens=1000)
    with server.slow_steps(0.02):
        page["run"].click()
        page.until(lambda: page.tile("Batch") == "1" and page.tile("Tokens per second") != "0")
        page.until(lambda: page.browser.find_element(By.CSS_SELECTOR, "polyline").get_attribute("points").count(",") >= 2)
        page["stop"].click()
        page.until_run()
    assert re.search(r"forward \d", page["legend"].text)


def test_it_asks_for_a_key(browser: Any) -> None:
    with running(api_keys=("sesame",)) as server:
        page = Page(browser, server)
        for given, state in (("wrong", "an API key is needed"), ("sesame", "ready")):
            page.until(lambda: page["key-card"].is_displayed())
            page.fill(key=given)
            page["key"].send_keys(Keys.ENTER)
            page.until(lambda state=state: page["state"].text == state)
        page.until(lambda: not page["key-card"].is_displayed())
        page.fill(prompt="x", max_tokens=3)
        page["run"].click()
        assert page.until_run().startswith("x") and "3 tokens" in page["run-state"].text
        browser.get("about:blank")


def test_nothing_from_elsewhere(server: Running) -> None:
    reply = server.http.get("/")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
    assert not re.search(r'(src|href)="(?!data:,")', reply.text) and not re.search(r'\s(style|on\w+)="', reply.text)
    assert len(reply.content) < 40_000


@pytest.mark.picture
def test_a_picture_for_the_docs(browser: Any) -> None:
    with running(decoder_options={"draft": "bundled", "cache_tokens": 16384}) as server, server.slow_steps(0.004):
        page = Page(browser, server)
        stop = threading.Event()

        def load(i: int) -> None:
            k = 0
            while not stop.is_set():
                shared = "import os\nimport re\n\n\ndef main(arguments):\n    " * 6
                server.post(prompt=f"{shared}x{i}_{k} = ", max_tokens=60 + 40 * (i % 4), temperature=0.5, seed=i, ignore_eos=True)
                k += 1
                time.sleep(0.3 * (i % 3))

        threads = [threading.Thread(target=load, args=(i,)) for i in range(7)]
        for thread in threads:
            thread.start()
        time.sleep(20)
        page.fill(max_tokens=150, temperature=0.4, top_k=40, top_p=0.95, seed=7)
        page["run"].click()
        page.until(lambda: re.match(r"[6-9]\d pieces", page["run-state"].text))
        browser.save_screenshot(str(PICTURE))
        stop.set()
        page.until_run()
        for thread in threads:
            thread.join(SECONDS)
        browser.get("about:blank")
