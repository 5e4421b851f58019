"""A headless Chromium, for measuring and testing reports."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from latent_grpo.common.config import ConfigError

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def missing() -> str | None:
    """Returns a sentence about what is not installed, or None if a browser can be started."""
    if shutil.which("chromedriver") is None or not any(map(shutil.which, NAMES)):
        return "needs Chromium and its driver (Debian and Ubuntu: apt-get install chromium chromium-driver)"
    try:
        import selenium.webdriver  # noqa: F401
    except ImportError:
        return "needs the package selenium: pip install 'latent-grpo[dev]'"
    return None


@contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[Chrome]:
    """Starts a browser with a fresh profile. Its console is recorded for `get_log("browser")`. Raises ConfigError."""
    if (reason := missing()) is not None:
        raise ConfigError(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, NAMES)))
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", f"window-size={width},{height}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def open_report(driver: Chrome, report: Path, address: str = "", timeout_s: float = 30.0) -> None:
    """Opens a report at an address (`#/...`) and waits until the page is shown."""
    driver.get("about:blank")  # another fragment of the same file would not load it again
    driver.get_log("browser")
    driver.get(report.resolve().as_uri() + address)
    wait_for(driver, "'ready' in document.documentElement.dataset", timeout_s)


def wait_for(driver: Chrome, condition: str, timeout_s: float = 30.0) -> None:
    """Waits until the JavaScript expression is true; raises selenium's TimeoutException."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, timeout_s, poll_frequency=0.02).until(lambda d: d.execute_script(f"return {condition}"))
