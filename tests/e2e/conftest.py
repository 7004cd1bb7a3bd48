"""A real browser, and somebody who looks; the fleet is each module's own (``world``)."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.conftest import need
from tests.e2e.visitor import ARGUMENTS, CHROMIUM, SIZES, Visitor


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    need("chromium", "" if shutil.which(CHROMIUM) else f"{CHROMIUM} is not there")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(params=sorted(SIZES))
def width(request) -> int:
    return request.param


@pytest.fixture
def visitor(browser, world, width) -> Iterator[Visitor]:
    visitor = Visitor(browser, world, width)
    yield visitor
    visitor.context.close()
