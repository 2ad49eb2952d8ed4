"""Uses the page of `ng-sample serve` in headless Chromium as a person does, and takes pictures of it.

    python tests/page/run.py --program target/release/ng-sample --models A=DIR B=DIR --out DIR

Fails at the first thing that a person would miss. Pictures are for the eye: wide, and as on a phone.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--force-device-scale-factor=1",
]
WAIT = 60


class Page:
    def __init__(self, address: str, models: list[str], out: pathlib.Path, profile: str):
        self.models = models
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        downloads = {"download.default_directory": str(out.resolve())}
        options.add_experimental_option("prefs", downloads)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService("/usr/bin/chromedriver")
        self.driver = webdriver.Chrome(options=options, service=service)
        self.out = out
        self.size(1100, 800)
        self.driver.get(address)
        self.until(lambda: self.one("[name=model] option"), "the models are listed")

    def one(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def until(self, holds, what: str):
        try:
            return WebDriverWait(self.driver, WAIT, 0.05).until(lambda _: holds())
        except Exception as error:
            self.shot("failed")
            raise SystemExit(f"not seen: {what} ({type(error).__name__})") from None

    def size(self, width: int, height: int):
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})

    def shot(self, name: str):
        self.driver.save_screenshot(str(self.out / f"{name}.png"))

    def fill(self, name: str, text: str):
        field = self.one(f"[name={name}]")
        field.clear()
        field.send_keys(text)

    def press(self, *keys):
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def loaded(self, selector: str) -> bool:
        script = "const i = document.querySelector(arguments[0]); return i.complete && i.naturalWidth > 0"
        return self.driver.execute_script(script, selector)

    def count(self, selector: str) -> int:
        return len(self.driver.find_elements(By.CSS_SELECTOR, selector))


def generate(page: Page):
    """By keyboard alone: type, start, see previews and then the image."""
    page.one("[name=prompt]").send_keys('red "HAT"')
    page.fill("seed", "7")
    page.fill("steps", "100")
    seen = """
        window.previews = new Set();
        window.said = [];
        new MutationObserver(() => {
          window.said.push(document.querySelector("#status").textContent);
          const caption = document.querySelector("#result figcaption").textContent;
          if (caption === "preview") window.previews.add(document.querySelector("#result img").src);
        }).observe(document.querySelector("#stage"), {subtree: true, childList: true, attributes: true});
    """
    page.driver.execute_script(seen)
    page.one("[name=prompt]").send_keys(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: "seed 7" in page.one("#result figcaption").text, "the image has a caption")
    page.until(lambda: page.loaded("#result img"), "the image is shown")
    said = page.driver.execute_script("return window.said")
    assert any(text.startswith("step ") for text in said), "steps are counted"
    assert any(text.endswith(" s left") for text in said), "the time left is told"
    previews = page.driver.execute_script("return window.previews.size")
    assert previews >= 2, f"{previews} previews"
    assert page.count("#history li") == 1, "the image is in the history"
    page.fill("steps", "8")
    page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.count("#history li") == 2, "a second image is in the history")
    page.shot("create")


def cancel(page: Page):
    page.fill("steps", "100")
    page.fill("width", "192")
    page.fill("height", "192")
    page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.one("#result figcaption").text == "preview", "a preview is shown")
    page.shot("progress")
    start = time.monotonic()
    page.press(Keys.ESCAPE)
    page.until(lambda: page.one("#error").text == "cancelled", "the page says cancelled")
    print(f"cancelled in {time.monotonic() - start:.2f} s")


def history(page: Page):
    page.driver.refresh()
    page.until(lambda: page.count("#history li") == 2, "the history outlives the page")
    page.one("#history button").click()
    assert page.one("[name=prompt]").get_attribute("value") == 'red "HAT"'
    assert page.one("[name=seed]").get_attribute("value") == "7"


def compare(page: Page):
    page.one("#tab-create").send_keys(Keys.ARROW_RIGHT)
    page.fill("prompt", 'green "OWL"')
    page.fill("seed", "3")
    page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.loaded("#slider .a") and page.loaded("#slider .b"), "both images")
    slider = page.one("#slider input")
    before = page.one("#slider .pair").get_attribute("style")
    slider.send_keys(*[Keys.ARROW_LEFT] * 20)
    assert page.one("#slider .pair").get_attribute("style") != before, "the slider moves"
    page.shot("compare")


def vote(page: Page) -> dict:
    page.one("#tab-compare").send_keys(Keys.ARROW_RIGHT)
    page.one("[name=prompts]").send_keys('red "HAT"', Keys.ENTER, 'green "OWL"', Keys.ENTER, 'blue "CUP"')
    page.fill("seed", "100")
    page.press(Keys.CONTROL, Keys.ENTER)
    for index, key in enumerate([Keys.ARROW_LEFT, Keys.ARROW_DOWN, "u", Keys.ARROW_RIGHT, Keys.ARROW_LEFT]):
        number = [1, 2, 3, 2, 3][index]
        page.until(lambda: page.one("#ballot").is_displayed(), "two images to choose from")
        page.until(lambda: page.one("#question").text.startswith(f"{number} of 3"), f"pair {number}")
        names = page.driver.execute_script("return document.querySelector('#ballot').innerHTML")
        assert not any(model in names for model in page.models), "the votes are blind"
        if index == 0:
            page.shot("vote")
        page.press(key)
    page.until(lambda: page.one("#outcome").is_displayed(), "the result")
    page.shot("result")
    page.one("#save").click()
    saved = page.out / "votes.json"
    page.until(saved.exists, "the votes are saved")
    votes = json.loads(saved.read_text())
    assert [v["seed"] for v in votes["votes"]] == [100, 101, 102]
    assert all(v["winner"] in votes["models"] for v in votes["votes"])
    low, high = votes["wins"]["interval"]
    assert 0 <= low < votes["wins"]["share"] < high <= 1 or votes["wins"]["share"] in (0, 1)
    return votes


def phone(page: Page):
    page.size(390, 844)
    page.driver.refresh()
    page.until(lambda: page.count("#history li") == 2, "the history on a phone")
    page.one("#history button").click()
    wide = page.driver.execute_script("return document.documentElement.scrollWidth")
    assert wide <= 390, f"the page is {wide} pixels wide on a phone of 390"
    small = page.driver.execute_script("""
        return [...document.querySelectorAll("button, select, input")]
          .filter((e) => e.offsetParent && e.getBoundingClientRect().height < 40 && e.type !== "range")
          .map((e) => e.id || e.name)""")
    assert not small, f"too small for a finger: {small}"
    page.shot("phone")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    parser.add_argument("--models", nargs=2, required=True, metavar="NAME=DIR")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "votes.json").unlink(missing_ok=True)
    command = [args.program, "serve", "--listen", "127.0.0.1:0", "--threads", "1"]
    for model in args.models:
        command += ["--model", model]
    log = open(args.out / "server.log", "w")
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        address = server.stdout.readline().strip()
        with tempfile.TemporaryDirectory() as profile:
            names = [model.split("=")[0] for model in args.models]
            page = Page(address, names, args.out, profile)
            try:
                generate(page)
                cancel(page)
                history(page)
                compare(page)
                vote(page)
                phone(page)
                complaints = [e for e in page.driver.get_log("browser") if e["level"] == "SEVERE"]
                assert not complaints, complaints
            finally:
                page.driver.quit()
    finally:
        server.terminate()
        status = server.wait(30)
    assert status == 0, f"the server ended with {status}"
    print("the page works")


if __name__ == "__main__":
    sys.exit(main())
