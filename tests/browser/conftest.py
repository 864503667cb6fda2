"""A browser that fails a test on any message, error or request of the page that it shows."""

import os
import shutil

import pytest

from vitcmp.report.html import render_html

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
LOCAL = ("file:", "data:", "blob:", "about:")


@pytest.fixture(scope="session")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing(f"no browser: none of {', '.join(BROWSERS)} is installed")
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """An empty page, 1280 x 900; what it complains of or asks the network for fails the test at its end."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page, faults = context.new_page(), []
    page.set_default_timeout(20_000)
    page.on("console", lambda message: message.type in ("error", "warning") and faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: request.url.startswith(LOCAL) or faults.append(f"request of {request.url}"))
    yield page
    context.close()
    assert not faults, "\n".join(faults)


@pytest.fixture
def make_page(tmp_path):
    """Writes the report of a payload and returns its path."""

    def make(payload, name="report.html"):
        path = tmp_path / name
        path.write_text(render_html(payload), encoding="utf-8")
        return path

    return make
