"""The console as people use it: a whole fleet, a real browser, wide and narrow."""

import json
import subprocess
import sys
from collections.abc import Iterator
from email.message import Message
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import pytest
from playwright.sync_api import expect

from skerry.wire.api import LoginLink, NodeView
from tests.e2e.visitor import LIVE_MS, Visitor
from tests.e2e.world import World, running, wait_until

HOSTILE = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


class Kept(HTTPRedirectHandler):
    """Redirects are looked at, not followed."""

    def redirect_request(self, *_args: object, **_more: object) -> None:
        return None


def ask(url: str, method: str = "GET", **headers: str) -> tuple[int, Message, bytes]:
    try:
        with build_opener(Kept).open(Request(url, headers=headers, method=method), timeout=20) as response:
            return response.status, response.headers, response.read()
    except HTTPError as exc:
        with exc:
            return exc.code, exc.headers, exc.read()


@pytest.fixture(scope="module")
def world(browser, scale_model) -> Iterator[World]:
    with running() as world:
        world.push(scale_model, "scale")
        settings = world.box("store-2").folder / "agent.toml"
        settings.write_text(settings.read_text().replace('region = "north"', f'region = "north", note = "{HOSTILE}"'))
        world.do(world.fleet.kill("store-2.agent"))
        world.do(world.fleet.start_process("store-2.agent"))
        wait_until(lambda: "note" in world.node("store-2").labels and world.node("store-2").state == "online", 20)
        yield world


@pytest.mark.parametrize("width", [1280], indirect=True)
def test_who_is_not_logged_in_meets_the_login_page_and_gets_back_to_what_was_asked_for(visitor, world):
    page = visitor.open("/nodes/store-1?minutes=60")
    assert urlsplit(page.url).path == "/login"
    page.get_by_text("Log in with a token").click()
    page.get_by_label("Token").fill("wrong")
    with page.expect_response("**/login") as answer:
        page.get_by_role("button", name="Log in with it").click()
    assert answer.value.status == 403
    expect(page.get_by_role("alert").filter(has_text="no token that lets you in")).to_be_visible()
    page.get_by_label("Token").fill(world.fleet.token)
    page.get_by_role("button", name="Log in with it").click()
    page.wait_for_url("**/nodes/store-1?minutes=60")
    cookie = visitor.context.cookies()[0]
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    page.get_by_role("button", name="Log out").click()
    assert urlsplit(visitor.open("/").url).path == "/login"


@pytest.mark.parametrize("target", ["//evil.example/", "https://evil.example/", "/\\evil.example", "/login"])
@pytest.mark.parametrize("width", [1280], indirect=True)
def test_a_login_leads_to_no_other_site(visitor, world, target):
    page = visitor.open("/login")
    page.evaluate("target => document.querySelectorAll('input[name=next]').forEach(input => input.value = target)", target)
    page.get_by_text("Log in with a token").click()
    page.get_by_label("Token").fill(world.fleet.token)
    page.get_by_role("button", name="Log in with it").click()
    page.wait_for_url(world.fleet.url + "/")


@pytest.mark.parametrize("width", [390], indirect=True)
def test_a_login_link_works_once_and_not_twice_and_a_preview_does_not_spend_it(visitor, browser, world):
    link = world.api.call("POST", "/v1/login-links", LoginLink)
    assert ask(link.url, method="HEAD")[0] == 303
    visitor.page.goto(link.url)
    visitor.page.wait_for_url(world.fleet.url + "/")
    second = Visitor(browser, world, 390)
    try:
        answer = second.page.goto(link.url)
        assert answer.status == 403
        expect(second.page.get_by_text("used already")).to_be_visible()
        assert urlsplit(second.open("/").url).path == "/login"
    finally:
        second.context.close()


def test_the_overview_shows_boxes_and_a_new_deployment_without_a_reload(visitor, world, width):
    name = f"live-{width}"
    page = visitor.log_in()
    for box in world.fleet.boxes:
        expect(page.locator(f'tr[data-live="box-{box.name}"]')).to_contain_text("online")
    page.evaluate("window.stillHere = true")
    world.deploy(f"name: {name}\nmodel: scale:1\nplace: {{tier: [edge, cloud]}}\nresources: {{memory: 64MiB}}\n")
    row = page.locator(f'tr[data-live="deployment-{name}"]')
    expect(row).to_contain_text("4 of 4", timeout=LIVE_MS)
    expect(page.locator("#headline")).to_contain_text("All is well", timeout=LIVE_MS)
    assert page.evaluate("window.stillHere")
    expect(page.locator("#pulse")).to_contain_text("live")
    row.get_by_role("link", name=name).click()
    page.wait_for_url(f"**/deployments/{name}")
    placement = page.locator(f'tr[data-live="placement-store-1-{name}-0"]')
    expect(placement).to_contain_text("tier edge")
    expect(placement).to_contain_text("ready")
    assert visitor.complaints == []
    assert visitor.foreign() == []


def test_every_page_loads_fits_its_width_and_asks_nobody_else(visitor, world):
    page = visitor.log_in()
    world.deploy("name: shown\nmodel: scale:1\nplace: {labels: {site: store-1}}\nresources: {memory: 64MiB}\n")
    for path in (
        "/",
        "/nodes",
        "/nodes/store-1",
        "/deployments/shown",
        "/models",
        "/rollouts",
        "/events",
        "/events?node=store-1&subject=shown",
    ):
        answer = page.goto(world.fleet.url + path)
        assert answer.status == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        expect(page.locator("#pulse")).to_contain_text("live")
        if path == "/nodes/store-1":
            expect(page.locator('figure[data-plot="load"] canvas')).to_be_visible(timeout=LIVE_MS)
        wide, seen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= seen, f"{path} is {wide} pixels wide of {seen}"
    assert visitor.complaints == []
    assert visitor.foreign() == []
    for path, word in (("/nodes/nobody", "no box “nobody”"), ("/deployments/nothing", "no deployment “nothing”"), ("/nowhere", "no page")):
        assert page.goto(world.fleet.url + path).status == 404
        expect(page.locator("main")).to_contain_text(word)
        expect(page.get_by_role("link", name="Back to the overview")).to_be_visible()


def test_what_spreads_is_followed_on_the_page_of_rollouts_without_a_reload(visitor, world):
    visitor.log_in()
    text = "name: spreads\nmodel: scale:1\nplace: {tier: [edge]}\nresources: {memory: SIZE}\nrollout: {waves: [1, '100%'], observe: 2s}\n"
    world.deploy(text.replace("SIZE", "64MiB"))
    world.wait_ready("spreads")
    page = visitor.open("/rollouts")
    page.evaluate("window.stillHere = true")
    expect(page.locator("main")).to_contain_text("each box keeps what it has")
    world.deploy(text.replace("SIZE", "72MiB"))
    panel = page.get_by_role("region", name="spreads")
    expect(panel).to_contain_text("spreading", timeout=LIVE_MS)
    expect(panel).to_contain_text("Wave 1, 1 of ")
    expect(panel).to_contain_text("done", timeout=3 * LIVE_MS)
    assert page.evaluate("window.stillHere")
    world.api.call("DELETE", "/v1/deployments/spreads", object)
    assert visitor.complaints == []


def test_a_deployment_is_changed_in_the_editor_with_a_mistake_and_then_right(visitor, world):
    visitor.log_in()
    text = "name: written\nmodel: scale:1\nplace: {labels: {site: store-1}}\nresources: {memory: 64MiB}\n"
    world.deploy(text)
    world.wait_ready("written")
    page = visitor.open("/deployments/written")
    page.get_by_role("link", name="Change it").click()
    page.wait_for_url("**/deployments/written/edit")
    expect(page.locator("#verdict")).to_contain_text("what it is already", timeout=LIVE_MS)
    expect(page.get_by_role("button", name="Apply")).to_be_disabled()
    page.get_by_role("textbox", name="What it is to be").fill(text.replace("memory:", "memroy:"))
    expect(page.locator("#verdict")).to_contain_text("memroy", timeout=LIVE_MS)
    expect(page.get_by_role("button", name="Apply")).to_be_disabled()
    page.get_by_role("button", name="Go to line 4").click()
    chosen = page.evaluate(
        "(() => { const t = document.getElementById('text'); return t.value.slice(t.selectionStart, t.selectionEnd) })()"
    )
    assert chosen == "resources: {memroy: 64MiB}"
    page.get_by_role("textbox", name="What it is to be").fill(text.replace("64MiB", "72MiB"))
    expect(page.locator("#verdict")).to_contain_text("1 replica changes", timeout=LIVE_MS)
    expect(page.locator("#steps")).to_contain_text("memory 64 MiB becomes 72 MiB")
    expect(page.locator("#steps")).to_contain_text("label site=store-2 does not match")
    page.get_by_role("button", name="Apply").click()
    page.wait_for_url("**/deployments/written")
    expect(page.locator("main")).to_contain_text("72MiB", timeout=LIVE_MS)
    world.api.call("DELETE", "/v1/deployments/written", object)
    assert visitor.complaints == []
    assert visitor.foreign() == []


def test_a_box_is_drained_and_a_deployment_deleted_from_their_pages_once_what_happens_was_read(visitor, world):
    visitor.log_in()
    world.deploy("name: goes\nmodel: scale:1\nplace: {labels: {site: store-1}}\nresources: {memory: 64MiB}\n")
    world.wait_ready("goes")
    page = visitor.open("/nodes/store-1")
    dialog = page.get_by_role("dialog")
    page.get_by_role("button", name="Drain").click()
    expect(dialog).to_contain_text("store-1 is to run nothing: ")
    expect(dialog).to_contain_text("goes")
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog).to_be_hidden()
    assert not world.api.call("GET", "/v1/nodes/store-1", NodeView).drained_at_ms
    page.get_by_role("button", name="Drain").click()
    dialog.get_by_role("textbox").fill("new <fan>")
    dialog.get_by_role("button", name="Drain").click()
    expect(page.locator("main")).to_contain_text("new <fan>", timeout=LIVE_MS)
    page.get_by_role("button", name="Let it run again").click()
    dialog.get_by_role("button", name="Let it run again").click()
    expect(page.get_by_role("button", name="Drain")).to_be_visible(timeout=LIVE_MS)
    world.wait_ready("goes")
    page = visitor.open("/deployments/goes")
    page.get_by_role("button", name="Delete").click()
    expect(dialog).to_contain_text("goes stops everywhere: 1 replica on 1 of the boxes")
    world.api.call("DELETE", "/v1/deployments/goes", object)
    dialog.get_by_role("button", name="Delete").click()
    expect(dialog.get_by_role("alert")).to_contain_text("no deployment")
    assert visitor.foreign() == []


def test_a_change_is_paused_approved_and_aborted_on_the_page(visitor, world):
    visitor.log_in()
    waves = "rollout: {waves: [1, '100%'], observe: 1s, approve: true}\n"
    text = "name: asks\nmodel: scale:1\nplace: {tier: [edge]}\nresources: {memory: SIZE}\n" + waves
    world.deploy(text.replace("SIZE", "64MiB"))
    world.wait_ready("asks")
    world.deploy(text.replace("SIZE", "72MiB"))
    page = visitor.open("/rollouts")
    panel, dialog = page.get_by_role("region", name="asks"), page.get_by_role("dialog")
    for word, then in (("Pause", "Resume"), ("Resume", "Pause"), ("Approve the next wave", "Abort")):
        panel.get_by_role("button", name=word).click(timeout=3 * LIVE_MS)
        dialog.get_by_role("button", name=word).click()
        expect(dialog).to_be_hidden()
        expect(panel.get_by_role("button", name=then)).to_be_visible(timeout=LIVE_MS)
    panel.get_by_role("button", name="Abort").click()
    expect(dialog).to_contain_text("goes back to")
    dialog.get_by_role("button", name="Abort").click()
    expect(panel).to_contain_text("aborted", timeout=LIVE_MS)
    expect(panel.get_by_role("button")).to_have_count(0)
    world.api.call("DELETE", "/v1/deployments/asks", object)
    assert visitor.complaints == []


def test_boxes_are_found_by_words_that_stand_in_the_address(visitor):
    page = visitor.log_in()
    visitor.open("/nodes")
    expect(page.locator("h1")).to_contain_text("4 boxes")
    page.get_by_role("searchbox").fill("store site=store-2")
    page.get_by_role("button", name="Find").click()
    page.wait_for_url("**/nodes?q=store+site%3Dstore-2")
    expect(page.locator("h1")).to_contain_text("1 found")
    expect(page.locator('tr[data-live="box-store-2"]')).to_be_visible()
    expect(page.locator('tr[data-live="box-store-1"]')).to_have_count(0)
    page.go_back()
    expect(page.locator('tr[data-live="box-store-1"]')).to_be_visible()
    visitor.open("/nodes?q=state:well")
    expect(page.get_by_role("alert").first).to_contain_text("state is one of")
    visitor.open("/nodes?q=nothing-like-it")
    expect(page.locator("main")).to_contain_text("No box is found by that")
    assert visitor.complaints == []


def test_what_a_sandbox_writes_is_followed_on_a_page(visitor, world, scale_model):
    """A model whose warm-up run can't work: its worker says why, and it is told once."""
    visitor.log_in()
    warmup = json.dumps([{"name": "z", "shape": [1, 3]}])
    pushed = world.cli("model", "push", str(scale_model), "--name", "tells", "--version", "1", "--warmup", warmup)
    assert pushed.returncode == 0, pushed.stderr
    world.deploy("name: tells\nmodel: tells:1\nplace: {labels: {site: store-1}}\nresources: {memory: 256MiB}\n")
    page = visitor.open("/nodes/store-1")
    page.get_by_role("link", name="Logs of tells-0").click(timeout=LIVE_MS)
    page.wait_for_url("**/nodes/store-1/logs/tells-0")
    expect(page.locator("#log")).to_contain_text("load failed", timeout=LIVE_MS)
    with page.expect_response(lambda answer: "/logs?" in answer.url and "after=&" not in answer.url + "&", timeout=LIVE_MS) as next_answer:
        pass
    assert next_answer.value.json()["lines"] == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    world.api.call("DELETE", "/v1/deployments/tells", object)
    expect(page.locator("#log-state")).to_contain_text("asking on", timeout=3 * LIVE_MS)
    assert page.goto(world.fleet.url + "/nodes/store-1/logs/nothing-0").status == 404
    assert visitor.foreign() == []


def test_keys_lead_to_pages_and_to_the_search_unless_they_are_turned_off(visitor, world):
    page = visitor.log_in()
    page.keyboard.press("g")
    page.keyboard.press("r")
    page.wait_for_url(world.fleet.url + "/rollouts")
    page.keyboard.press("/")
    page.wait_for_url(world.fleet.url + "/nodes#search")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("g?/")
    expect(page.get_by_role("searchbox")).to_have_value("g?/")
    page.locator("h1").click()
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Keys")
    expect(dialog).to_contain_text("Look for boxes")
    dialog.get_by_role("checkbox").uncheck()
    dialog.get_by_role("button", name="Close").click()
    page.keyboard.press("g")
    page.keyboard.press("e")
    expect(dialog).to_have_count(0)
    page.get_by_role("button", name="Keys").click()
    dialog.get_by_role("checkbox").check()
    dialog.get_by_role("button", name="Close").click()
    assert page.url == world.fleet.url + "/nodes#search"
    page.keyboard.press("g")
    page.keyboard.press("e")
    page.wait_for_url(world.fleet.url + "/events")
    assert visitor.complaints == []


def test_a_hostile_label_or_filter_is_text(visitor):
    page = visitor.log_in()
    for path in ("/", "/nodes/store-2"):
        visitor.open(path)
        expect(page.get_by_text(HOSTILE).first).to_be_visible()
    visitor.open("/events?node=" + '"><script>window.hacked=1</script>')
    assert page.get_by_label("Box").input_value() == '"><script>window.hacked=1</script>'
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('main script, main img').length") == 0
    assert visitor.complaints == []


@pytest.mark.parametrize("width", [1280], indirect=True)
def test_a_box_that_is_heard_no_more_is_called_silent_and_nothing_worse_without_a_reload(visitor, world):
    visitor.log_in()
    page = visitor.open("/nodes/van-7")
    page.evaluate("window.stillHere = true")
    world.do(world.fleet.kill("van-7.agent"))
    try:
        expect(page.locator("main")).to_contain_text("can't tell a crash from a cut link", timeout=2 * LIVE_MS)
        expect(page.locator("h1")).to_contain_text("silent")
    finally:
        world.do(world.fleet.start_process("van-7.agent"))
    expect(page.locator("h1")).to_contain_text("online", timeout=2 * LIVE_MS)
    assert page.evaluate("window.stillHere")


@pytest.mark.parametrize("width", [1280], indirect=True)
def test_a_page_that_hears_nothing_says_so(visitor):
    page = visitor.log_in()
    page.clock.install()
    page.route("**/v1/stream", lambda route: route.abort())
    visitor.open("/")
    page.clock.run_for(25_000)
    expect(page.locator("#stale")).to_contain_text("What you see may be old")
    expect(page.locator("#pulse")).to_contain_text("no word")


def test_fragments_hold_the_content_alone_and_static_files_are_asked_for_again_cheaply(world):
    url = world.fleet.url
    status, headers, _ = ask(url + "/?fragment=1")
    assert (status, headers["Location"]) == (303, "/login")
    status, headers, body = ask(url + "/?fragment=1", Authorization=f"Bearer {world.fleet.token}")
    assert status == 200
    assert b"<html" not in body
    assert b'id="headline"' in body
    status, headers, _ = ask(url + "/static/live.js")
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "text/javascript; charset=utf-8", "no-cache")
    status, _, _ = ask(url + "/static/live.js", **{"If-None-Match": headers["ETag"]})
    assert status == 304
    for path in ("/static/../pages.py", "/static/%2e%2e/pages.py", "/static/vendor/uplot/LICENSE", "/static/nothing.js"):
        assert ask(url + path)[0] in (303, 404)


@pytest.mark.parametrize("width", [1280, 390], indirect=True)
def test_people_are_invited_log_in_make_tokens_and_are_removed(visitor, browser, world, width):
    command = [sys.executable, "-m", "coordinator", "admin-link", "--config", str(world.fleet.folder / "coordinator" / "coordinator.toml")]
    link = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    page = visitor.page
    page.goto(link)
    page.get_by_label("Name").fill(f"ada{width}")
    page.get_by_label("Password, 12").fill("seven red lighthouses")
    page.get_by_label("The same again").fill("seven red lighthouses")
    page.get_by_role("button", name="Set it and log in").click()
    page.wait_for_url(world.fleet.url + "/")
    page.get_by_role("link", name="Users").click()
    page.get_by_label("Name", exact=True).fill(f"vera{width}")
    page.get_by_role("button", name="Invite").click()
    invitation = page.locator(".told pre").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    guest = Visitor(browser, world, width)
    try:
        guest.page.goto(invitation)
        guest.page.get_by_label("Password, 12").fill("nine green buoys")
        guest.page.get_by_label("The same again").fill("nine green buoys")
        guest.page.get_by_role("button", name="Set it and log in").click()
        guest.page.wait_for_url(world.fleet.url + "/")
        expect(guest.page.get_by_role("link", name="Users")).to_have_count(0)
        assert guest.page.goto(world.fleet.url + "/users").status == 403
        assert guest.page.goto(world.fleet.url + "/nodes/store-1").status == 200
        expect(guest.page.get_by_role("button", name="Drain")).to_have_count(0)
        guest.page.goto(world.fleet.url + "/account")
        guest.page.get_by_label("What it is for").fill("a dashboard")
        guest.page.get_by_role("button", name="Make a token").click()
        token = guest.page.locator(".told pre").inner_text()
        assert ask(world.fleet.url + "/v1/status", Authorization=f"Bearer {token}")[0] == 200
        assert guest.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.get_by_role("row").filter(has_text=f"vera{width}").get_by_role("button", name="Remove").click()
        expect(page.get_by_role("row").filter(has_text=f"vera{width}")).to_have_count(0)
        assert urlsplit(guest.open("/").url).path == "/login"
        assert ask(world.fleet.url + "/v1/status", Authorization=f"Bearer {token}")[0] == 401
    finally:
        guest.context.close()
    page.get_by_role("link", name="Audit").click()
    removed = page.get_by_role("row").filter(has_text="user.removed").filter(has_text=f"vera{width}")
    expect(removed).to_contain_text(f"ada{width}")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
