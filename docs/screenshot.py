"""Makes docs/images/serve.png, the page of `gen-worker serve`. Needs chromium and chromedriver."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.browser import Browser, browser
from tests.support.dev_server import DevServer, copy_of

TARGET = Path(__file__).parent / "images" / "serve.png"
WIDTH, HEIGHT = 1240, 1240


def run(page: Browser, function: str, fields: dict[str, str]) -> None:
    page.one(f"#functions button[data-name={function}]").click()
    page.one("#function-name", function)
    for path, text in fields.items():
        field = page.field(path)
        if field.tag_name != "select":
            field.clear()
        field.send_keys(text)
    page.one("#run").click()
    page.wait(lambda: page.one("#run").is_enabled())


def main() -> None:
    TARGET.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        project = copy_of("serve", Path(place))
        with (
            browser(Path(place) / "chromium", WIDTH, HEIGHT) as page,
            DevServer(project, "--executors", "2") as server,
        ):
            server.wait_ready()
            page.driver.get(server.url)
            page.one("#phase", "serving")
            run(page, "tell", {"subject": "a fox"})
            run(page, "fail", {"how": "validation"})
            run(page, "paint", {"prompt": "evening over the bay", "palette": "sea", "steps": "6"})
            image = page.one("#output img")
            page.wait(lambda: image.get_property("naturalWidth") > 0)
            page.driver.execute_script("document.activeElement.blur()")
            page.driver.save_screenshot(str(TARGET))


if __name__ == "__main__":
    main()
