"""The page of `gen-worker serve`, in a real headless Chromium."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.browser import Browser, browser
from tests.support.dev_server import DevServer, copy_of

ROOT = Path(__file__).parents[2]
CTRL, ESCAPE, ENTER = "\ue009", "\ue00c", "\ue007"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of("serve", tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as window:
        yield window


@pytest.fixture(scope="module")
def server(project: Path, shared_browser: Browser) -> Iterator[DevServer]:  # no server where there is no browser
    (project / "words.txt").write_text("a few words")
    shutil.copy(ROOT / "examples/realtime/talk.py", project)
    model = {"cozy:demo/words:latest": {"root_dir": str(project), "files": {"words.txt": "words.txt"}}}
    env = {"WORKER_FAKE_GPU_COUNT": "1", "WORKER_MODEL_ARTIFACTS_JSON": json.dumps(model)}
    with DevServer(project, env=env) as server:
        yield server.wait_ready()


@pytest.fixture
def page(server: DevServer, shared_browser: Browser) -> Iterator[Browser]:
    shared_browser.driver.get("about:blank")
    shared_browser.driver.get(server.url)
    shared_browser.one("#phase", "serving")
    yield shared_browser
    assert shared_browser.complaints() == []


def choose(page: Browser, name: str) -> None:
    page.one(f"#functions button[data-name={name}]").click()
    page.one("#function-name", name)


def test_a_form_gives_a_picture(page: Browser) -> None:
    choose(page, "paint")
    assert "A picture of two colours that meet." in page.text("#function-about")
    prompt = page.field("prompt")
    prompt.send_keys("evening over the bay")
    page.field("palette").send_keys("sea")
    steps = page.field("steps")
    assert (steps.get_attribute("value"), steps.get_attribute("max")) == ("4", "50")
    page.one("[aria-label='give size']").click()
    width = page.field("size.width")
    width.clear()
    width.send_keys("64")
    page.field("tags").send_keys("calm\nblue")
    page.one("#run").click()
    image = page.one("#output img")
    page.wait(lambda: image.get_property("naturalWidth") == 64)
    page.one("#output pre", '"title": "evening over the bay"')
    page.one("#runs .succeeded button", "paint")
    page.one("#stage", "done")


def test_a_stream_is_shown_as_it_comes_by_keyboard_alone(page: Browser) -> None:
    choose(page, "tell")
    words = page.field("words")
    words.clear()
    words.send_keys("400")
    words.send_keys(CTRL + ENTER)
    page.one("#output pre.text", "Once there was")
    assert not page.one("#run").is_enabled()
    page.one("#runs .running button", "tell")
    page.press(ESCAPE)
    page.one("#error", "canceled")
    page.one("#runs .failed button", "tell")
    page.wait(lambda: page.one("#run").is_enabled())


def test_a_conversation_with_a_realtime_handler(page: Browser) -> None:
    choose(page, "uppercase")
    page.one("#frame").send_keys("hello")
    page.one("#run").click()
    page.one(".frames", '< {"text":"HELLO"}')
    page.one("#frame").send_keys(ESCAPE)
    page.one(".frames", "— closed: ")
    page.one("#frame").send_keys("bye")
    page.one("#run").click()
    page.one(".frames", "— closed: completed")


def test_what_is_wrong_is_said_where_it_is(page: Browser) -> None:
    choose(page, "paint")
    steps = page.field("steps")
    steps.clear()
    steps.send_keys("1.5")
    page.one("#run").click()
    page.one(".wrong", "a whole number is needed")
    assert steps.get_attribute("aria-invalid") == "true"
    assert page.driver.switch_to.active_element == steps
    choose(page, "fail")
    page.field("how").send_keys("internal")
    page.one("#run").click()
    page.one("#error", "internal: internal error")
    page.one("#error pre", "RuntimeError: a defect")  # what an operator would read


def test_a_file_goes_up_and_comes_back(page: Browser, tmp_path: Path) -> None:
    sound = tmp_path / "beep.wav"
    sound.write_bytes(b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x40\x1f\0\0\1\0\x08\0data\0\0\0\0")
    choose(page, "mirror")
    page.field("file").send_keys(str(sound))
    page.field("note").send_keys("a beep")
    page.one("#run").click()
    player = page.one("#output audio")
    assert "/v1/files/inputs/" in player.get_attribute("src")
    page.one("#output a", "beep.wav")
    page.field("note").clear()
    page.one("#runs button", "mirror").click()  # the run again, from the list
    page.wait(lambda: page.value("note") == "a beep")


def test_the_worker_is_shown_and_new_code_without_a_reload_of_the_page(page: Browser, project: Path) -> None:
    page.one("#executors li", "pid")
    page.one("#device li", "Simulated GPU")
    page.one("#device li", "24.0 GiB")
    page.one("#models li", "disk")
    choose(page, "ask")
    page.one("#run").click()
    page.one("#output pre", "a few words")
    page.one("#models li", "VRAM")
    choose(page, "tell")
    page.field("subject").send_keys(" of old")
    code = project / "studio.py"
    code.write_text(code.read_text().replace("    subject: str =", '    tone: str = "dry"\n    subject: str ='))
    page.field("tone")
    assert page.value("subject") == "an astronaut of old", "what was typed stays"


def test_an_executor_that_died_is_a_problem_until_another_serves(page: Browser, server: DevServer) -> None:
    choose(page, "tell")
    (executor,) = [child for child in server.family() if "executor" in child.cmdline()]
    executor.kill()
    page.one("#problem", "executor of slot 0 died: killed by SIGKILL")
    page.wait(lambda: not page.driver.find_element("id", "problem").is_displayed())
    page.one("#phase", "serving")
    page.one("#run").click()
    page.one("#stage", "done")


def test_dark_and_light(page: Browser) -> None:
    def ground() -> str:
        return str(page.driver.execute_script("return getComputedStyle(document.body).backgroundColor"))

    first = ground()
    page.one("#theme").click()
    assert ground() != first
    page.driver.refresh()
    page.one("#phase", "serving")
    assert ground() != first, "it is remembered"
    page.one("#theme").click()
