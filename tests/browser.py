"""A headless Chromium for tests of pages: an empty profile, no background traffic, and a log of what it asked for."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

CHROMEDRIVER = "/usr/bin/chromedriver"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A WebDriver; tests that use it are skipped where there is no Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: no test in a browser")
    driver = CHROMEDRIVER if Path(CHROMEDRIVER).exists() else shutil.which("chromedriver")
    if driver is None:
        pytest.skip("there is no chromedriver: no test in a browser (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        chrome.set_script_timeout(60)
        chrome.execute_cdp_cmd("Network.enable", {})
        yield chrome
    finally:
        chrome.quit()


def open_page(browser: Any, address: str | Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
    """Open a page at a width in CSS pixels, with empty logs, and wait until the figures near the screen are drawn."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(address.as_uri() if isinstance(address, Path) else address)
    wait_until(lambda: browser.execute_script("return document.documentElement.dataset.drawn") == "near")


def show(browser: Any, *charts: str) -> None:
    """Scroll to figures, one after the other, and wait until each is drawn: those far off are not."""
    scroll = "document.getElementById(arguments[0]).scrollIntoView({block: 'center', behavior: 'instant'})"
    is_drawn = "return document.getElementById(arguments[0]).querySelector('svg.main-svg') !== null"
    for chart in charts:
        browser.execute_script(scroll, chart)
        wait_until(partial(browser.execute_script, is_drawn, chart))


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What the condition gives when it first is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.05)
    return found


def complaints(browser: Any) -> list[str]:
    """What the console says: errors, warnings, violated policies."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def requests(browser: Any) -> list[str]:
    """All addresses that the page asked for, from the log of the network."""
    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]


def whole_screenshot(browser: Any) -> bytes:
    """The page from top to bottom as PNG."""
    import base64

    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    return base64.b64decode(shot["data"])
