"""The chat page in a real browser, without a screen.

What the model says is written for it, so that every kind of answer occurs.

NANOHYBRID_SCREENSHOTS=DIR keeps a picture of each state, to be looked at.
"""

import os
import shutil
import time
from pathlib import Path

import pytest
from serving import started

from nanohybrid.serve.service import Settings

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")

ANSWER = """# Sums
Adding is **easy**:
- take `2`
  - and then *3*
- get 5

1. first
2. second

| a | b |
|---|---|
| 1 | <b>x</b> |

> said once

```python
print(2 + 3)
```
<script>document.title = "broken"</script>"""
TOOLS = '[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]'


@pytest.fixture(scope="module")
def page():
    """A server whose next answers are scripted, and a browser on its page."""
    script = []

    def before(service):
        engine, add = service.loop.engine, service.loop.engine.add_choices

        def scripted(prompt, params, **more):
            requests = add(prompt, params, **more)
            if script:
                requests[0].forced.extend([*engine.tokenizer.encode(script.pop(0)), engine.tokenizer.eos_id])
            return requests

        engine.add_choices = scripted

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1000,800",
        "--force-color-profile=srgb",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with started(Settings(model_name="tiny", max_queue=4), before=before, max_model_len=2048) as serve:
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            yield Page(driver, serve, script)
        finally:
            driver.quit()


class Page:
    def __init__(self, driver, serve, script):
        self.driver, self.serve, self.script = driver, serve, script

    def open(self, dark=False, width=1000):
        self.script.clear()
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(self.serve.url)
        self.until(lambda: self.find("#model").text == "tiny")
        return self

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def say(self, text, *answers):
        self.script.extend(answers)
        self.find("#text").send_keys(text + "\n")

    def until(self, holds, seconds=15):
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.find("#talk").text
            time.sleep(0.02)

    def answered(self, count):
        self.until(lambda: self.find("#send").text == "Send" and len(self.all(".answer")) == count)

    def picture(self, name):
        if folder := os.environ.get("NANOHYBRID_SCREENSHOTS"):
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def widest(self):
        return self.driver.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )


@pytest.mark.parametrize(("dark", "width"), [(False, 1000), (True, 1000), (False, 390), (True, 390)])
def test_page_shows_a_conversation_with_folded_reasoning(page, dark, width):
    page.open(dark, width)
    page.picture(f"empty-{'dark' if dark else 'light'}-{width}")
    page.say("Add 2 and 3, please.", "I add them.\nThat is 5.</think>\n\n" + ANSWER)
    page.answered(1)
    page.say("Thank you.", "polite</think>\n\nYou are welcome.")
    page.answered(2)
    first = page.all(".answer")[0]
    assert [e.text for e in page.all(".user")] == ["Add 2 and 3, please.", "Thank you."]
    assert first.find_element("css selector", "summary").text.startswith("thought for ")
    assert not first.find_element("css selector", ".trace").is_displayed()
    first.find_element("css selector", "summary").send_keys("\n")  # by keyboard
    assert first.find_element("css selector", ".trace").text == "I add them.\nThat is 5."
    found = {
        tag: len(first.find_elements("css selector", tag))
        for tag in ("h2", "strong", "li", "li li", "ol li", "td", "th", "blockquote", "pre", "script")
    }
    assert found == {
        "h2": 1,
        "strong": 1,
        "li": 5,
        "li li": 1,
        "ol li": 2,
        "td": 2,
        "th": 2,
        "blockquote": 1,
        "pre": 1,
        "script": 0,
    }
    # No text of a model becomes markup.
    assert page.driver.title == "tiny" and "<b>x</b>" in first.text
    assert page.widest() <= 0
    page.driver.execute_script("document.getElementById('scroll').scrollTop = 0")
    page.picture(f"talk-{'dark' if dark else 'light'}-{width}")
    assert page.serve.metric("requests_running") == 0


def test_page_slider_sets_the_thinking_budget(page):
    page.open()
    slider = page.find("#budget")
    slider.send_keys(webdriver.ApiKeys.HOME, webdriver.ApiKeys.ARROW_RIGHT, webdriver.ApiKeys.ARROW_RIGHT)
    assert page.find("#budget-text").text == "16 tokens"
    page.say("hi")
    page.until(lambda: "by the budget" in page.find("#talk").text or "thought for" in page.find("#talk").text)
    spent = int(page.find("summary").text.split()[2])
    assert spent <= 16 + 8
    page.find("#thinks").click()
    assert page.find("#budget-text").text == "off" and not slider.is_enabled()
    page.find("#clear").click()
    page.say("hi", "plainly")
    page.answered(1)
    assert page.find(".answer").text.startswith("plainly") and not page.find("details").is_displayed()


@pytest.mark.parametrize("how", ["button", "escape"])
def test_page_stop_ends_the_answer_and_keeps_its_text(page, how):
    page.open()
    step = page.serve.service.loop.engine.step
    page.serve.service.loop.engine.step = lambda: (time.sleep(0.02), step())[1]
    try:
        page.say("Write much.", "so</think>\n\n" + "word " * 300)
        page.until(lambda: page.find(".answer").text.count("word") > 3)
        assert page.find("#send").text == "Stop"
        page.picture("going")
        page.find("#send").click() if how == "button" else page.find("body").send_keys(
            webdriver.ApiKeys.ESCAPE
        )
        page.answered(1)
        page.serve.until(page.serve.idle, 3)
    finally:
        page.serve.service.loop.engine.step = step
    assert "stopped" in page.find(".answer .note").text and 3 < page.find(".answer").text.count("word") < 250


@pytest.mark.parametrize("width", [1000, 390])
def test_page_shows_a_tool_call_and_sends_its_result(page, width):
    page.open(width=width)
    page.find("#tools").click()
    page.find("#schemas").send_keys(TOOLS)
    page.picture(f"tools-{width}")
    page.find("#tools").click()
    page.say(
        "Add 2 and 3.",
        'a tool</think>\n\n<TOOLCALL>[{"name": "add", "arguments": {"a": 2, "b": 3}}]</TOOLCALL>',
    )
    page.answered(1)
    assert page.find(".call strong").text == "calls add" and page.find(".call pre").text == '{"a": 2, "b": 3}'
    page.picture(f"call-{width}")
    asked = []
    page.serve.service.llm.template.encode, encode = (
        (lambda *a, **k: asked.append(a[1]) or encode(*a, **k)),
        page.serve.service.llm.template.encode,
    )
    try:
        page.script.append("seen</think>\n\nIt is 5.")
        page.driver.switch_to.active_element.send_keys("5\n")
        page.answered(2)
    finally:
        page.serve.service.llm.template.encode = encode
    assert [turn["role"] for turn in asked[0]] == ["user", "assistant", "tool"] and asked[0][2][
        "content"
    ] == "5"
    assert "It is 5." in page.all(".answer")[1].text and page.widest() <= 0


def test_page_shows_errors(page):
    page.open()
    page.find("#tools").click()
    page.find("#schemas").send_keys("[oops")
    page.find("#text").send_keys("hi\n")
    assert (
        "JSON" in page.find("#wrong").text
        and page.find("#text").get_attribute("value") == "hi"
        and not page.all(".user")
    )
    page.find("#schemas").clear()
    page.find("#text").clear()
    page.find("#tools").click()
    page.say("x" * 3000)
    page.until(lambda: page.all(".answer .error") and "context" in page.find("#talk").text)
    page.picture("error")
    errors = [
        entry
        for entry in page.driver.get_log("browser")
        if entry["level"] == "SEVERE" and "400" not in entry["message"]
    ]
    assert errors == []
