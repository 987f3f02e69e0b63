"""The page, in a real browser at a real server: it shows what the images API draws for the same settings."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import Served
from PIL import Image

from lcm_compile.output.picture_settings import read_origin

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; apt-get install chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
PROMPT = "a large red star on a white background"
KEY = "a key/ü#1"
# Keeps in `sent` what the page sends as files, in base64: the browser's protocol does not tell of those.
RECORDER = """
window.sent = [];
const send = WebSocket.prototype.send;
WebSocket.prototype.send = function (part) {
  if (part instanceof Blob) {
    const reader = new FileReader();
    reader.onload = () => sent.push(reader.result.split(",")[1]);
    reader.readAsDataURL(part);
  }
  return send.call(this, part);
};
"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(browser, url, expected="", **options):
    """A page that is open at a URL. What the browser complains of fails the test, unless it is expected."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    context.set_default_timeout(20_000)
    page = context.new_page()
    complaints, hosts = [], set()
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(httpx.URL(request.url).host))
    page.goto(url)
    yield page
    context.close()
    assert [text for text in complaints if not expected or expected not in text] == []
    assert hosts <= {"127.0.0.1", ""}, "something came from elsewhere"


@pytest.fixture
def page(browser, served):
    """The page, where it has drawn its first picture."""
    with opened(browser, served.url) as page:
        page.fill("#prompt", PROMPT)
        picture_of(page, PROMPT)
        yield page


def picture_of(page, prompt, pane=0):
    """The pixels that a pane shows, once it shows a picture of the prompt and no other is awaited."""
    label = "A picture without a prompt" if prompt == "" else prompt
    canvas = page.locator(".picture").nth(pane)
    playwright.expect(canvas).to_have_attribute("aria-label", label)
    return pixels_of(canvas)


def pixels_of(canvas):
    data = canvas.evaluate("canvas => canvas.toDataURL()").partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def shows(page, expected, pane=0):
    """Waits until a pane shows a picture."""
    canvas = page.locator(".picture").nth(pane)
    for _ in range(100):
        if np.array_equal(pixels_of(canvas), expected):
            return True
        page.wait_for_timeout(50)
    return False


def api(served, **settings):
    """The picture that the images API draws."""
    fields = {"model": "small", "prompt": PROMPT, "seed": 7, **settings}
    if image := fields.pop("image", None):
        texts = {
            name: json.dumps(value) if isinstance(value, dict) else str(value)
            for name, value in fields.items()
        }
        answer = served.client.post("/v1/images/edits", data=texts, files={"image": image})
    else:
        answer = served.client.post("/v1/images/generations", json=fields)
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)))


def test_draws_while_one_types(page, served):
    first = picture_of(page, PROMPT)
    np.testing.assert_array_equal(first, api(served))
    page.focus("#prompt")
    page.keyboard.press("End")
    page.keyboard.type(" on blue")
    second = picture_of(page, PROMPT + " on blue")
    assert not np.array_equal(second, first)
    np.testing.assert_array_equal(second, api(served, prompt=PROMPT + " on blue"))
    assert re.search(r"^\d+ ms", page.inner_text(".ms"))
    for stage in ("encode", "context", "4 steps", "decode"):
        assert re.search(rf"{stage} \d+\.\d", page.inner_text(".ms"))
    playwright.expect(page.locator("#told")).to_have_text(re.compile(r"Drawn in \d+ milliseconds\."))
    page.fill("#prompt", "x" * 32_001)
    playwright.expect(page.locator(".pane .error")).to_contain_text("the prompt has 32001 characters")
    page.fill("#prompt", "")
    picture_of(page, "")
    playwright.expect(page.locator(".pane .error")).to_be_hidden()


def test_every_control_changes_the_picture(page, served):
    seen = [picture_of(page, PROMPT)]

    def new(**settings):
        expected = api(served, **settings)
        assert not any(np.array_equal(expected, one) for one in seen)
        seen.append(expected)
        assert shows(page, expected), settings

    page.get_by_label("style").press("ArrowRight")
    new(loras={"style": 0.55})
    page.get_by_label("Steps").press("ArrowLeft")
    new(loras={"style": 0.55}, steps=3)
    page.get_by_label("Guidance").press("End")
    settings = {"loras": {"style": 0.55}, "steps": 3, "guidance_scale": 4}
    new(**settings)
    page.get_by_label("Sampler").select_option("ddim")
    settings["sampler"] = "ddim"
    new(**settings)
    page.fill("#negative", "blue")
    new(**settings, negative_prompt="blue")
    page.fill("#seed", "12")
    settings |= {"negative_prompt": "blue", "seed": 12}
    new(**settings)
    page.get_by_label("LoRA to add").select_option("zebra")
    settings["loras"] = {"style": 0.55, "zebra": 1.0}
    new(**settings)
    page.get_by_label("Size").select_option("96x64")
    new(**settings, size="96x64")
    page.get_by_label("Remove zebra").click()
    new(**settings | {"loras": {"style": 0.55}}, size="96x64")
    page.click("#dice")
    assert page.input_value("#seed") != "12"
    new(**settings | {"loras": {"style": 0.55}, "seed": int(page.input_value("#seed"))}, size="96x64")


def test_a_stroke_on_the_paper_becomes_a_picture(browser, served):
    with opened(browser, "about:blank") as page:
        page.add_init_script(RECORDER)
        page.goto(served.url)
        page.fill("#prompt", PROMPT)
        picture_of(page, PROMPT)
        page.get_by_label("Drawing").first.check(force=True)
        paper = page.locator("#drawing")

        def drawn(after=None):
            """The picture sent last, which is another than `after`, and what is drawn from it and shown."""
            page.wait_for_function("after => sent.length && sent.at(-1) !== after", arg=after)
            seen = None
            for _ in range(200):
                if (last := page.evaluate("sent.at(-1)")) != seen:
                    seen, image = last, base64.b64decode(last)
                    assert Image.open(io.BytesIO(image)).size == (64, 64)
                    strength = float(page.input_value("#strength input"))
                    expected = api(served, image=image, strength=strength)
                if np.array_equal(pixels_of(page.locator(".picture")), expected):
                    return last, expected
                page.wait_for_timeout(50)
            raise AssertionError("another picture is shown")

        white, blank = drawn()
        page.get_by_title("blue").locator("..").click()
        paper.click(position={"x": 60, "y": 60})
        blue, clicked = drawn(after=white)
        assert not np.array_equal(clicked, blank)
        page.click("#undo")
        np.testing.assert_array_equal(drawn(after=blue)[1], blank)
        paper.focus()
        page.keyboard.press(" ")
        dot, picture = drawn(after=white)
        page.keyboard.press("ArrowRight")
        line, longer = drawn(after=dot)
        assert not np.array_equal(longer, picture)
        page.get_by_label("Strength").press("End")
        drawn()
        box = paper.bounding_box()
        page.mouse.move(box["x"] + 40, box["y"] + 40)
        page.mouse.down()
        page.mouse.move(box["x"] + 200, box["y"] + 160, steps=4)
        page.mouse.up()
        drawn(after=line)

        page.get_by_label("Webcam").first.check(force=True)
        count = "document.querySelector('.picture').dataset.count"
        page.wait_for_function(f"before => {count} > before + 5", arg=int(page.evaluate(count)))
        page.get_by_label("Noise").check(force=True)
        assert shows(page, api(served))


def test_models_side_by_side(page, served):
    page.click("#add-pane")
    page.locator(".pane").nth(1).get_by_label("Model", exact=True).select_option("pairs")
    page.fill("#prompt", "a blue circle")
    for pane, model in enumerate(("small", "pairs")):
        picture_of(page, "a blue circle", pane)
        assert shows(page, api(served, prompt="a blue circle", model=model), pane)
    page.reload()
    assert shows(page, api(served, prompt="a blue circle", model="pairs"), pane=1)
    page.get_by_label("Drawing").first.check(force=True)
    hints = page.locator(".pane .hint")
    playwright.expect(hints.nth(1)).to_have_text("This model draws from the prompt alone.")
    assert hints.nth(0).is_hidden()
    page.get_by_label("Remove this model").first.click()
    assert page.locator(".pane").count() == 1
    assert page.get_by_label("Model", exact=True).input_value() == "pairs"


def test_a_kept_picture_is_drawn_again_from_its_link(browser, page, served):
    page.get_by_label("style").press("End")
    page.fill("#seed", "99")
    expected = api(served, seed=99, loras={"style": 2})
    assert shows(page, expected)
    page.get_by_role("button", name="Keep").click()
    kept = page.locator("#kept li")
    for fact in ("small", "64 × 64", "seed 99", "4 steps", "style 2", "ms"):
        assert fact in kept.inner_text()
    link = kept.get_by_role("link").get_attribute("href")
    page.fill("#prompt", "another")
    picture_of(page, "another")
    with page.expect_download() as saved:
        kept.get_by_role("button", name="Download").click()
    assert saved.value.suggested_filename == "a-large-red-star-on-a-white-background-99.png"
    file = Image.open(Path(saved.value.path()))
    np.testing.assert_array_equal(np.asarray(file), expected)
    assert read_origin(saved.value.path()).request.seed == 99
    kept.get_by_role("link").press("Enter")
    assert shows(page, expected)
    page.reload()
    assert page.locator("#kept li").count() == 1
    page.locator("#kept").get_by_label("Remove").click()
    assert page.locator("#kept li").count() == 0
    with opened(browser, link) as other:
        picture_of(other, PROMPT)
        assert shows(other, expected)
        other.keyboard.type("!")
        assert "#" not in other.url


def test_a_link_draws_exactly_what_it_says_or_tells(browser, served):
    link = "#prompt=a+blue+star&seed=3&steps=12&guidance_scale=1.25&lora=style:0.777&model=small"
    with opened(browser, f"{served.url}/{link}") as page:
        picture_of(page, "a blue star")
        settings = {"prompt": "a blue star", "seed": 3, "steps": 12, "guidance_scale": 1.25}
        assert shows(page, api(served, **settings, loras={"style": 0.777}))
        assert page.locator(".pane .hint").is_hidden()
        page.evaluate("location.hash = 'prompt=a+star&seed=3&model=gone&lora=lost:1'")
        picture_of(page, "a star")
        assert page.inner_text(".pane .hint") == (
            "Not on this server: model gone, LoRA lost. So the picture is another."
        )


def test_a_lost_server_comes_back_and_the_key_is_kept(browser, small):
    refused = "Failed to load resource"  # the browser's own word for a server that is not there, or says 401
    with Served(f"small={small}", env={"LCM_COMPILE_API_KEY": KEY}) as server:
        with opened(browser, server.url, refused) as page:
            page.wait_for_selector("#key-dialog[open]")
            page.keyboard.type("wrong")
            page.keyboard.press("Enter")
            playwright.expect(page.get_by_text("the API key is missing or wrong")).to_be_visible()
            page.keyboard.type(KEY)
            page.keyboard.press("Enter")
            page.wait_for_selector(".picture[data-count]")
            page.click("text=API")
            page.wait_for_selector(".opblock")
        address = f"{server.url}/#key=a%20key%2F%C3%BC%231"
        with opened(browser, address, refused) as page:
            page.wait_for_selector(".picture[data-count]")
            assert page.url == f"{server.url}/"
            _, told = server.stop(signal.SIGKILL)
            assert f"serving at {address}\n" in told
            notice = page.locator("#notice")
            playwright.expect(notice).to_contain_text("The server is gone")
            playwright.expect(page.locator("#countdown")).to_contain_text("Trying again in")
            page.click("#try-now")
            playwright.expect(page.locator("#countdown")).to_contain_text("Trying again in")
            page.fill("#prompt", PROMPT)
            server.process = subprocess.Popen(
                server.process.args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            server.client = httpx.Client(base_url=server.url, headers={"Authorization": "Bearer wrong"})
            server.wait()
            playwright.expect(notice).to_be_hidden()
            assert page.input_value("#prompt") == PROMPT
            picture_of(page, PROMPT)


def test_with_the_keyboard_alone(page, served):
    """By Tab every control is reached, and shows it; by Enter, space and arrows it does what it is for."""
    page.focus("#prompt")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
              const own = document.activeElement;
              const names = [...(own.labels ?? [])].map((label) => label.textContent.trim());
              const marked = own.type === "radio" ? own.nextElementSibling : own;
              const style = getComputedStyle(marked);
              return [own.ariaLabel || names[0] || own.textContent.trim(),
                      style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
            }"""
        )
        if name in reached or name == "":
            break
        assert outline, f"{name} does not show that it is chosen"
        reached.append(name)
        if name == "Another seed":
            page.keyboard.press("Enter")
        if name == "Keep":
            page.keyboard.press(" ")
        if name == "Steps":
            page.keyboard.press("ArrowRight")
    wanted = ["Negative prompt", "Seed", "Another seed", "Noise", "Keep", "Download", "Copy link", "Model"]
    wanted += ["Size", "Steps", "Guidance", "style", "LoRA to add", "+ Another model beside it"]
    assert [name for name in reached if name in wanted] == wanted
    seed = int(page.input_value("#seed"))
    assert seed != 7
    assert shows(page, api(served, seed=seed, steps=5))
    assert page.locator("#kept li").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone_in_light_and_dark(browser, served, scheme):
    phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": scheme, "reduced_motion": "reduce"}
    with opened(browser, served.url, **phone) as page:
        page.fill("#prompt", PROMPT + " and" * 30 + "x" * 200)
        page.get_by_role("button", name="Keep").click()
        page.click("#add-pane")
        page.get_by_label("Drawing").first.check(force=True)
        page.wait_for_selector("#source:visible")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        outside = """[...document.querySelectorAll("body *")].filter((one) => {
          const box = one.getBoundingClientRect();
          return box.width > 1 && (box.right > 391 || box.left < -1);
        }).map((one) => one.outerHTML.slice(0, 80))"""
        assert page.evaluate(outside) == []
        luminance = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.search(r"\d+", luminance)[0]) < 128) == (scheme == "dark")
        assert (
            page.evaluate("getComputedStyle(document.querySelector('.picture')).imageRendering")
            == "pixelated"
        )
        assert (
            page.evaluate("getComputedStyle(document.querySelector('.picture')).transitionDuration") == "0s"
        )
