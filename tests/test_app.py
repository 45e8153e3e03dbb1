# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""The browser app, in a headless Chromium at the widths of a phone and of a desktop."""

import os
import re
import runpy
import shutil
import threading
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
import tomllib
from huggingface_hub import ModelCard
from PIL import Image

from llava_merge.demo import MODEL_DIR, PICTURE
from llava_merge.demo.scenes import draw_scene, scene_of


gr = pytest.importorskip("gradio", reason="extra `app`")
sync_api = pytest.importorskip("playwright.sync_api", reason="extra `test`")

from llava_merge.demo.browser import LAUNCH, MAX_QUESTION_LENGTH, draw_other_scene, make_app, merger_choices, read  # noqa: E402


pytestmark = pytest.mark.newest
CHROMIUM = shutil.which("chromium")
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
TIMEOUT = 60_000  # milliseconds; a busy machine is slow


@pytest.fixture(scope="module")
def address():
    page = make_app()
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **LAUNCH)
    yield address
    page.close()


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("needs chromium, as Debian packages it")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=SIZES)
def page(request, chromium, address):
    """The app in a new window, answered once; `page.hosts` are those that it asked for anything."""
    width, height = SIZES[request.param]
    page = chromium.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(TIMEOUT)
    page.hosts, page.problems = set(), []
    page.on("request", lambda asked: page.hosts.add(urllib.parse.urlsplit(asked.url).hostname))
    page.on("pageerror", lambda error: page.problems.append(f"{error} {error.stack}"))
    page.goto(address)
    expect_answer(page, "merged", "314")
    yield page
    if "SCREENSHOTS" in os.environ:  # a folder: to be looked at
        page.screenshot(path=f"{os.environ['SCREENSHOTS']}/{request.node.name}.png", full_page=True)
    page.close()
    assert page.hosts <= {"127.0.0.1", None} and not page.problems


def expect_answer(page, which: str, text: str | re.Pattern):
    sync_api.expect(page.locator(f"#{which}_answer h3")).to_have_text(text, timeout=TIMEOUT)


def expect_tokens(page, number: int):
    sync_api.expect(page.locator("#merged_answer")).to_contain_text(f"{number} visual tokens,", timeout=TIMEOUT)


def upload(page, path: Path):
    page.get_by_label("Remove Image").click()
    page.locator("input[type=file]").first.set_input_files(path)


class TestInABrowser:
    def test_a_picture_is_asked_about_and_its_tokens_slid(self, page, tmp_path):
        scene, _ = scene_of("test", 3)
        draw_scene(scene).save(tmp_path / "scene.png")
        before = page.locator("#overlay img").get_attribute("src")
        upload(page, tmp_path / "scene.png")
        sync_api.expect(page.locator("#merged_answer h3")).to_have_count(0)  # was about the picture before
        page.get_by_label("Question").fill("How many shapes are there?")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect_answer(page, "unmerged", str(len(scene.shapes)))
        sync_api.expect(page.locator("#unmerged_answer")).to_contain_text("576 visual tokens,")
        expect_answer(page, "merged", re.compile(r".+"))
        expect_tokens(page, 16)
        after = page.locator("#overlay img").get_attribute("src")
        assert after != before
        page.get_by_role("spinbutton").fill("4")
        page.get_by_role("spinbutton").blur()
        expect_tokens(page, 4)
        page.get_by_role("slider").focus()
        page.keyboard.press("ArrowRight")
        expect_tokens(page, 5)
        assert page.locator("#overlay img").get_attribute("src") != after
        page.get_by_text("Each token's patches").click()
        page.wait_for_function("document.querySelector('#token_maps img')?.naturalWidth > 112")
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0

    def test_another_merger_question_and_scene(self, page):
        page.get_by_label("Merger").click()
        page.get_by_role("option", name="tome").click()
        sync_api.expect(page.locator("#merged_answer")).to_contain_text("16 visual tokens")
        page.get_by_role("button", name="Where is the yellow square?").click()
        expect_answer(page, "unmerged", "bottom left")
        page.get_by_role("button", name="Draw another scene").click()
        sync_api.expect(page.locator("#unmerged_answer h3")).to_have_count(0)

    def test_what_cannot_be_asked_gets_a_message_and_the_page_goes_on(self, page, tmp_path):
        (tmp_path / "broken.png").write_bytes(PICTURE.read_bytes()[:2000])
        upload(page, tmp_path / "broken.png")
        page.get_by_role("button", name="Ask", exact=True).click()
        message = page.locator(".toast-body")
        sync_api.expect(message).to_contain_text("The file is not a picture that can be opened")
        page.get_by_test_id("toast-close").click()
        page.get_by_label("Remove Image").click()
        page.get_by_role("button", name="Ask", exact=True).click()
        sync_api.expect(message).to_contain_text("There is no picture")
        page.get_by_test_id("toast-close").click()
        page.locator("input[type=file]").first.set_input_files(PICTURE)
        page.get_by_role("button", name="Ask", exact=True).click()
        expect_answer(page, "merged", "314")

    def test_a_large_upload_is_refused(self, page, tmp_path):
        (tmp_path / "large.png").write_bytes(PICTURE.read_bytes() + bytes(21 << 20))
        upload(page, tmp_path / "large.png")
        sync_api.expect(page.locator(".toast-body")).to_contain_text("exceed the maximum allowed size")


class TestWithoutABrowser:
    @pytest.mark.parametrize(
        "path, question, message",
        [
            (None, "What?", "There is no picture: upload one"),
            (str(PICTURE), "  ", "There is no question: type one"),
            (str(PICTURE), "a" * (MAX_QUESTION_LENGTH + 1), "more than 1000: shorten it"),
            (str(MODEL_DIR / "config.json"), "What?", "config.json is not a picture"),
        ],
    )
    def test_what_cannot_be_used_is_named(self, path, question, message):
        with pytest.raises(ValueError, match=message):
            read(path, question)

    def test_a_picture_of_many_pixels_is_refused(self, tmp_path):
        Image.new("1", (8000, 8000)).save(tmp_path / "large.png")
        with pytest.raises(ValueError, match="more than 50 megapixels"):
            read(str(tmp_path / "large.png"), "What?")

    def test_mergers_to_choose_among(self):
        names = [name for name, _ in merger_choices(True, ["mine", "tome"])]
        assert names[:5] == ["mine", "tome", "question_aware", "agnostic", "salient"] and names.count("tome") == 1
        choices = merger_choices(False, [])
        assert "none" not in names and ("random", "random") in choices and choices[0] == ("own", "own")
        assert ("c_abstractor (untrained)", "c_abstractor") in choices

    def test_scenes_are_drawn(self):
        assert draw_other_scene().size == (336, 336)

    def test_any_checkpoint(self, tmp_path):
        page = make_app(str(MODEL_DIR), ["tome"], 36)
        assert page.blocks and any(getattr(each, "value", None) == 36 for each in page.blocks.values())
        with pytest.raises(ValueError, match="neither a method"):
            make_app(mergers=["tomee"])

    def test_the_address_is_loopback_and_no_file_of_the_server_is_served(self, address):
        assert address.startswith("http://127.0.0.1:")
        for path in ("/etc/passwd", str(MODEL_DIR / "config.json")):
            assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404)


def test_the_space(monkeypatch):
    """Its app starts the page as the command does, and its front matter is what the Hub reads."""
    folder = Path(__file__).parents[1] / "examples" / "app"
    launched = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **options: launched.append((page, options)))
    runpy.run_path(str(folder / "app.py"))
    assert launched[0][0].blocks and launched[0][1] == LAUNCH
    data = ModelCard((folder / "README.md").read_text()).data.to_dict()
    assert data["sdk"] == "gradio" and (folder / data["app_file"]).exists()
    project = tomllib.loads((folder.parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["demo"], *extras["app"]]
    assert (folder / "requirements.txt").read_text().split("\n") == [
        *(name for name in needed if not name.startswith("llava-merge")),  # which is uploaded
        "",
    ]


class TestRequests:
    """What a client may send without a browser."""

    @pytest.fixture(scope="class")
    def internal(self):
        """A server that only this machine reaches, with a picture, and the paths that it was asked for."""
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(PICTURE.read_bytes())

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/internal.png", asked
        server.shutdown()

    def ask(self, address: str, picture=None, question="What number is shown?", merger="question_aware", budget=16):
        """The last event of a question about what the inputs are given."""
        api, session = f"{address}gradio_api", uuid.uuid4().hex
        functions = httpx.get(f"{address}config").json()["dependencies"]
        number = next(each["id"] for each in functions if each["api_name"].startswith("shown"))
        body = {"data": [picture, question, merger, budget], "fn_index": number}
        httpx.post(f"{api}/queue/join", json={**body, "session_hash": session}).raise_for_status()
        with httpx.stream("GET", f"{api}/queue/data?session_hash={session}", timeout=60) as events:
            return next(line for line in events.iter_lines() if "process_completed" in line)

    @pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}], ids=["file", "plain"])
    @pytest.mark.parametrize("stream", [True, False])
    def test_only_uploads_are_opened(self, address, internal, tmp_path, stream, meta):
        """Not what this machine reaches, and not its files, whatever a request calls them."""
        url, asked = internal
        shutil.copy(PICTURE, tmp_path / "private.png")
        for path in (url, str(tmp_path / "private.png"), str(PICTURE)):
            event = self.ask(address, {"path": path, "is_stream": stream, **meta})
            assert '"success":false' in event and "visual tokens" not in event, path
        assert not asked

    def test_errors_of_visitors_are_not_in_the_log(self, address, capfd):
        event = self.ask(address)
        assert '"success":false' in event and "There is no picture" in event
        assert "Traceback" not in capfd.readouterr().err

    @pytest.mark.parametrize("name", ["picture", "question", "merger", "budget"])
    def test_no_input_makes_gradio_fetch_a_url(self, address, internal, name, monkeypatch):
        """Its own guard lets addresses pass that it takes for public ones, and all where a proxy is set."""
        url, asked = internal

        async def download(url, *args, **kwargs):
            asked.append(url)
            return str(PICTURE)

        monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", download)
        with PICTURE.open("rb") as file:
            (path,) = httpx.post(f"{address}gradio_api/upload", files={"files": file}).json()
        picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
        event = self.ask(address, **{"picture": picture, name: {"path": url, "meta": {"_type": "gradio.FileData"}}})
        assert '"success":false' in event and "Only pictures that were uploaded" in event
        assert not asked

    def test_an_upload_is_answered(self, address):
        with PICTURE.open("rb") as file:
            (path,) = httpx.post(f"{address}gradio_api/upload", files={"files": file}).json()
        event = self.ask(address, {"path": path, "meta": {"_type": "gradio.FileData"}})
        assert '"success":true' in event and "576 visual tokens" in event

    def test_a_large_picture_is_refused_before_it_is_decoded(self, tmp_path, monkeypatch):
        Image.new("L", (8000, 8000)).save(tmp_path / "large.png")
        monkeypatch.setattr("llava_merge.demo.browser.open_image", None)
        with pytest.raises(ValueError, match="more than 50 megapixels"):
            read(str(tmp_path / "large.png"), "What?")
