"""A real headless Chromium for the tests of the page."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.dev_server import wait_for

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--force-device-scale-factor=1",
)  # fmt: skip


class Browser:
    """A window on a page of the development server; elements are named by CSS selectors."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def one(self, selector: str, text: str = "") -> Any:
        """The visible element whose text holds `text`, once there is one."""

        def look() -> Any:
            script = """return [...document.querySelectorAll(arguments[0])].find(
                (each) => each.offsetParent !== null && (each.textContent.includes(arguments[1])))"""
            return self.driver.execute_script(script, selector, text)

        return wait_for(look, lambda: f"{selector} with {text!r} in: {self.text('body')}")

    def text(self, selector: str) -> str:
        return str(self.driver.execute_script("return document.querySelector(arguments[0]).innerText", selector))

    def field(self, path: str) -> Any:
        return self.one(f"[data-path='{path}']")

    def value(self, path: str) -> str:
        """What stands in a field now, which may be another element a moment later."""
        script = "return document.querySelector(`[data-path='${arguments[0]}']`)?.value ?? ''"
        return str(self.driver.execute_script(script, path))

    def wait(self, check: Callable[[], Any]) -> Any:
        return wait_for(check, lambda: self.text("body"))

    def press(self, keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(keys)

    def complaints(self) -> list[str]:
        """What the console says of errors, broken rules of the page's own policy included."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def browser(profile: Path, width: int = 1360, height: int = 900) -> Iterator[Browser]:
    """A new one with a profile of its own; skips the test where there is no Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver_program = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver_program is None:
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_program))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
