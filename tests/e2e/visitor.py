"""Somebody with a browser who looks at a fleet's console."""

from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page

from skerry.wire.api import LoginLink
from tests.e2e.world import World

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SIZES = {1280: {"width": 1280, "height": 900}, 390: {"width": 390, "height": 844}}
LIVE_MS = 20_000


class Visitor:
    """A browser of one size; what its pages complained about and asked for is kept."""

    def __init__(self, browser: Browser, world: World, width: int) -> None:
        self.world = world
        self.context = browser.new_context(viewport=SIZES[width])
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, path: str) -> Page:
        self.page.goto(self.world.fleet.url + path)
        return self.page

    def log_in(self) -> Page:
        link = self.world.api.call("POST", "/v1/login-links", LoginLink)
        self.page.goto(link.url)
        self.page.wait_for_url(self.world.fleet.url + "/")
        return self.page

    def path(self) -> str:
        parts = urlsplit(self.page.url)
        return parts.path + (f"?{parts.query}" if parts.query else "")

    def foreign(self) -> list[str]:
        return [url for url in self.asked if not url.startswith(self.world.fleet.url + "/")]
