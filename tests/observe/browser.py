"""A headless Chromium that looks at the status page."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

from .tools import tool

PATIENCE_S = 20
_FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "disable-dev-shm-usage",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "hide-scrollbars",
    "force-prefers-reduced-motion",
)


class Browser:
    """One window. All calls block."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def look(self, *, width: int = 1280, height: int = 900, dark: bool = False, phone: bool = False) -> None:
        """Like which screen."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def open(self, port: int) -> None:
        """The page, with everything on it once."""
        self.driver.get(f"http://127.0.0.1:{port}/")
        self.until("document.querySelector('#state').textContent != 'connecting'")
        self.until("document.querySelector('#chart-tiers .times span').textContent")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self.driver.execute_script(f"return {script}")

    def until(self, script: str) -> Any:
        """Wait until an expression is true; its value."""
        return WebDriverWait(self.driver, PATIENCE_S, 0.05).until(lambda _: self.run(script), script)

    def text(self, selector: str) -> str:
        """What an element says."""
        return str(self.run(f"document.querySelector({selector!r}).innerText"))

    def errors(self) -> list[str]:
        """What went wrong so far, as the console tells it."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]


@contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    options = Options()
    options.binary_location = tool("chromium")
    for flag in (*_FLAGS, f"user-data-dir={directory / 'chromium'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(tool("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
