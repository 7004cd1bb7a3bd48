"""The console's pages, one by one, as people use them: the map, a model that is tried, the first steps, what can be set, what everybody may
see. Nothing on them keeps out who can't see or use a mouse."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.helper as oh
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, expect

from skerry.cli.client import CliError
from skerry.wire.api import LoadView, NodeView
from skerry.wire.decision import WhatIf
from skerry.wire.fleet import Difference, FleetView, FlowView, MapView
from skerry.wire.identity import ClaimView
from skerry.wire.model_graph import ModelGraph
from skerry.wire.slowest import SlowestOfAll
from tests.e2e.visitor import LIVE_MS
from tests.e2e.world import World, running, wait_until

PIXELS = "name: pixels\nmodel: pixels:1\nplace: {tier: [edge]}\nresources: {memory: 128MiB}\nslo: {deadline_ms: 5000}\n"
PATHS = (
    "/", "/nodes", "/nodes/store-1", "/deployments/pixels", "/deploy", "/models", "/models/pixels/1", "/split", "/rollouts", "/events",
    "/audit", "/start", "/api", "/settings", "/account",
)  # fmt: skip
wide = pytest.mark.parametrize("width", [1280], indirect=True)


def pixels_model(path: Path) -> Path:
    """The mean of each colour of an image, and the image upside down."""
    graph = oh.make_graph(
        [oh.make_node("ReduceMean", ["image"], ["colour"], axes=[2, 3], keepdims=0)],
        "g",
        [oh.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, 8, 16])],
        [oh.make_tensor_value_info("colour", onnx.TensorProto.FLOAT, [1, 3])],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 13)], ir_version=8)
    oh.set_model_props(model, {"labels": "red\ngreen\nblue"})
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="module")
def world(browser, tmp_path_factory) -> Iterator[World]:
    with running() as world:
        world.push(pixels_model(tmp_path_factory.mktemp("m") / "pixels.onnx"), "pixels")
        world.deploy(PIXELS)
        world.wait_ready("pixels")
        yield world


def shot(page: Page, name: str) -> None:
    """Kept where SKERRY_SHOTS says, for who wants to see what a run saw."""
    if folder := os.environ.get("SKERRY_SHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def shows(page: Page, words: str) -> None:
    """What the map says that it shows."""
    expect(page.locator("#map > canvas")).to_have_attribute("aria-label", re.compile(words), timeout=2 * LIVE_MS)


def test_the_map_shows_each_box_and_one_that_dies_and_leads_to_it(visitor, world, width):
    page = visitor.log_in()
    shows(page, "4 boxes: 4 online")
    found = world.api.call("GET", "/v1/map", MapView)
    assert found.cells == "oooo"
    assert [group.value for group in found.groups] == ["", "store-1", "store-2", "van-7"]
    again = world.api.call("GET", "/v1/map", MapView, query={"layout": found.layout})
    assert (again.groups, again.cells) == ([], "oooo")
    page.evaluate("window.stillHere = true")
    world.do(world.fleet.kill("van-7.agent"))
    try:
        shows(page, "4 boxes: 1 silent, 3 online")
        expect(page.locator("#headline")).to_contain_text("needs a look", timeout=LIVE_MS)
        expect(page.locator(".map-legend")).to_contain_text("silent 1")
        shot(page, f"fleet-silent-{width}")
    finally:
        world.do(world.fleet.start_process("van-7.agent"))
    shows(page, "4 boxes: 4 online")
    assert page.evaluate("window.stillHere")
    page.locator(".map-by select").select_option("region")
    page.locator("#map > canvas").focus()
    page.keyboard.press("End")
    expect(page.locator("#map .tip")).to_have_text("van-7, road: online", timeout=LIVE_MS)
    page.keyboard.press("Home")
    expect(page.locator("#map .tip")).to_contain_text("cloud-1")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    page.wait_for_url("**/nodes/van-7")
    assert visitor.complaints == []
    assert visitor.foreign() == []


def test_the_fleet_in_sums_is_the_fleet_box_by_box(world):
    wait_until(lambda: world.status().nodes_online == 4, 20)
    fleet = world.api.call("GET", "/v1/fleet", FleetView)
    [summary] = fleet.deployments
    view = world.deployment("pixels")
    assert (summary.ready, summary.wanted, summary.boxes) == (view.ready, view.wanted, 3)
    assert fleet.states["online"] == len(world.nodes())
    status = world.status()
    assert (status.nodes, status.nodes_online, status.deployments_ready) == (4, 4, 1)
    names = [node.id for node in world.api.call("GET", "/v1/nodes", list[NodeView], query={"q": "model:pixels:1"})]
    assert names == sorted({placed.node for placed in view.placements})


@wide
def test_a_model_is_looked_into_and_tried_with_an_image(visitor, world, tmp_path):
    Image.new("RGB", (40, 20), (255, 0, 51)).save(tmp_path / "red.png")
    page = visitor.log_in()
    page.goto(world.fleet.url + "/models")
    page.get_by_role("link", name="pixels").first.click()
    page.wait_for_url("**/models/pixels/1")
    expect(page.locator("main")).to_contain_text("FP32 1 × 3 × 8 × 16")  # noqa: RUF001 - as it is shown
    expect(page.locator("#network svg")).to_be_visible(timeout=LIVE_MS)
    expect(page.locator("#network")).to_contain_text("ReduceMean")
    graph = world.api.call("GET", "/v1/models/pixels/versions/1/graph", ModelGraph)
    assert [node.op for node in graph.nodes] == ["ReduceMean"]
    page.get_by_label("Image for image").set_input_files(tmp_path / "red.png")
    expect(page.locator(".preview")).to_be_visible()
    page.get_by_role("button", name="Ask").click()
    answer = page.locator("#try-answer")
    expect(answer).to_contain_text("edge answered", timeout=LIVE_MS)
    expect(answer.locator(".best li").first).to_contain_text("red 1.000")
    assert [item.split() for item in answer.locator(".best li").all_inner_texts()] == [
        ["red", "1.000"],
        ["blue", "0.2000"],
        ["green", "0.000"],
    ]
    expect(answer.locator(".timing")).to_contain_text("compute")
    shot(page, "model-tried")
    page.get_by_label("What image is made of").select_option("numbers")
    page.get_by_label("Values of image").fill("0.5 nonsense")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#try-status")).to_contain_text("not all of it is numbers")
    assert visitor.complaints == []
    assert visitor.foreign() == []


def test_a_deployment_is_asked_through_the_coordinator_and_its_refusals_are_the_boxes_words(world):
    good = {"inputs": [{"name": "image", "shape": [1, 3, 8, 16], "datatype": "FP32", "data": [0.25] * 384}]}

    def ask(body: object, path: str = "/v1/deployments/pixels/infer", **query: str) -> dict:
        return world.api.call("POST", path, dict, body=json.dumps(body).encode(), query=query)

    assert ask(good, node="store-2")["outputs"][0]["data"] == [0.25] * 3
    for body, path, query, words in (
        ({"inputs": []}, "/v1/deployments/pixels/infer", {}, "box store-1: "),
        (good, "/v1/deployments/nothing/infer", {}, "there is no deployment"),
        (good, "/v1/deployments/pixels/infer", {"node": "cloud-1"}, "not ready on box 'cloud-1'"),
    ):
        with pytest.raises(Exception, match=words):
            ask(body, path, **query)


@wide
def test_a_replica_is_started_anew_from_its_boxs_page_and_no_request_is_lost(visitor, world):
    page = visitor.log_in()
    page.goto(world.fleet.url + "/nodes/store-1")
    before = world.node("store-1").replicas[0]
    page.get_by_role("button", name="restart").click()
    expect(page.get_by_role("dialog")).to_contain_text("so that no request is lost")
    page.locator("dialog button.do").click()
    wait_until(lambda: [one.sandbox != before.sandbox and one.phase == "ready" for one in world.node("store-1").replicas] == [True], 30)
    assert world.events(node="store-1", kind="replica.restart")
    alike = world.api.call("GET", "/v1/nodes/store-1/difference", Difference)
    assert alike.is_alike, alike
    expect(page.locator('[data-live="difference"]')).to_contain_text("Alike in all", timeout=LIVE_MS)
    assert world.cli("node", "restart", "store-1", "pixels-0").returncode == 0
    assert world.cli("node", "restart", "store-1", "nothing-0").returncode == 5
    assert world.cli("node", "restart", "nobody", "pixels-0").returncode == 5
    wait_until(lambda: world.deployment("pixels").ready == 3, 30)
    assert visitor.complaints == []


@wide
def test_what_is_unlike_is_shown_while_it_is(visitor, world):
    world.deploy("name: huge\nmodel: pixels:1\nplace: {labels: {site: store-2}}\nresources: {memory: 64MiB}\n")
    page = visitor.log_in()
    page.goto(world.fleet.url + "/nodes/store-2")
    expect(page.locator('[data-live="difference"]')).to_contain_text("Alike in all 9", timeout=LIVE_MS)
    page.locator('[data-live="difference"] summary').click()
    expect(page.locator('[data-live="difference"]')).to_contain_text("pixels:1")
    world.api.call("DELETE", "/v1/deployments/huge", object)
    wait_until(lambda: len(world.node("store-2").replicas) == 1, 30)


def test_the_link_and_the_network_of_a_box_are_measured(world):
    def points() -> LoadView:
        return world.api.call("GET", "/v1/nodes/store-1/load", LoadView, query={"minutes": "5"})

    wait_until(lambda: any(point.link_rtt_ms > 0 for point in points().points), 20)
    assert all(0 <= point.link_rtt_ms < 5000 and point.network_sent_bytes_per_s >= 0 for point in points().points)


def test_the_split_is_shown_as_a_picture_and_a_box_is_asked_what_it_would_do(visitor, world, width):
    good = {"inputs": [{"name": "image", "shape": [1, 3, 8, 16], "datatype": "FP32", "data": [0.25] * 384}]}
    for _ in range(5):
        world.api.call("POST", "/v1/deployments/pixels/infer", dict, body=json.dumps(good).encode(), query={"node": "store-2"})

    def asked() -> int:
        flow = world.api.call("GET", "/v1/flow", FlowView)
        return sum(row.edge for row in flow.rows if row.value == "store-2")

    wait_until(lambda: asked() >= 5, 20)
    page = visitor.log_in()
    page.goto(world.fleet.url + "/split")
    expect(page.locator("svg.flow")).to_contain_text("store-2")
    page.get_by_text("As a table").click()
    expect(page.locator('[data-live="flow"] table')).to_contain_text("store-2")
    expect(page.locator('[data-live="noted"]')).to_contain_text("fits here", timeout=LIVE_MS)
    form = page.locator("#whatif")
    form.get_by_label("Box").fill("store-1")
    form.get_by_label("Deadline, ms").fill("3000")
    form.get_by_role("button", name="Ask").click()
    expect(page.locator("#whatif-answer")).to_contain_text("store-1: would answer itself")
    expect(page.locator("#whatif-answer")).to_contain_text(re.compile(r"(29\d\d|3000) ms left"))
    form.get_by_label("Box").fill("cloud-1")
    form.get_by_role("button", name="Ask").click()
    expect(page.locator("#whatif-answer")).to_contain_text("not ready on box 'cloud-1'")
    again = page.locator("#replay")
    again.get_by_label("Deadline, ms").fill("1")
    again.get_by_role("button", name="Decide anew").click()
    answer = page.locator("#replay-answer")
    expect(answer).to_contain_text(re.compile(r"([12]) of \1 boxes that had requests told: "), timeout=LIVE_MS)
    expect(answer.locator("table").first).to_contain_text(re.compile(r"refused\s*0\s*\d+ \(\+\d+\)"))
    expect(answer).to_contain_text("here it would take")
    shot(page, f"replay-{width}")
    again.get_by_label("Deadline, ms").fill("")
    again.get_by_label("no other box reached").check()
    again.get_by_role("button", name="Decide anew").click()
    expect(answer).to_contain_text("No request would have gone elsewhere.", timeout=LIVE_MS)
    page.goto(world.fleet.url + "/split?deployment=pixels&by=region&minutes=15")
    expect(page.locator("svg.flow")).to_contain_text("north")
    across, seen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert across <= seen
    shot(page, f"split-{width}")
    assert visitor.foreign() == []


def test_what_took_longest_and_how_versions_serve_is_told_of_a_deployment(visitor, world, width):
    image = {"name": "image", "shape": [1, 3, 8, 16], "datatype": "FP32", "data": [0.5] * 384}
    for node in ("store-1", "store-2"):
        world.api.call("POST", "/v1/deployments/pixels/infer", dict, body=json.dumps({"inputs": [image]}).encode(), query={"node": node})

    def told() -> SlowestOfAll:
        return world.api.call("GET", "/v1/deployments/pixels/slowest", SlowestOfAll)

    wait_until(lambda: {"store-1", "store-2"} <= set(told().asked), 20, told)
    found = told()
    assert [one.took_ms for one in found.requests] == sorted((one.took_ms for one in found.requests), reverse=True)
    assert all("compute;dur=" in one.timing for one in found.requests if one.who == "edge")
    assert {one.asked for one in found.requests} >= {"store-1", "store-2"}
    only = world.api.call("GET", "/v1/deployments/pixels/slowest", SlowestOfAll, query={"node": "store-2", "minutes": "60"})
    assert {one.asked for one in only.requests} == {"store-2"}
    nowhere = world.api.call("GET", "/v1/deployments/pixels/decisions", WhatIf, query={"node": "store-77"})
    assert (nowhere.silent, nowhere.asked) == (["store-77: there is no such box"], [])
    with pytest.raises(CliError, match="split"):
        world.api.call("GET", "/v1/deployments/pixels/decisions", WhatIf, query={"split": "sideways"})
    said = world.cli("what-if", "pixels", "--deadline", "1ms", "--minutes", "60")
    assert (said.returncode, b"as it would have been" in said.stdout) == (0, True), said.stderr
    said = world.cli("slowest", "pixels")
    assert (said.returncode, b"compute;dur=" in said.stdout.replace(b"\n", b"")) == (0, True), said.stderr
    page = visitor.log_in()
    page.goto(world.fleet.url + "/deployments/pixels")
    slowest = page.locator("#slowest")
    expect(slowest.locator("tbody tr").first).to_contain_text("compute", timeout=LIVE_MS)
    expect(slowest).to_contain_text("boxes that had requests told.")
    versions = page.locator("section", has=page.locator("#versions-title"))
    expect(versions).to_contain_text("pixels:1")
    across, seen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert across <= seen
    shot(page, f"deployment-{width}")
    assert visitor.foreign() == []


@wide
def test_a_box_is_let_in_from_the_first_steps_and_seen_to_join(visitor, world):
    page = visitor.log_in()
    page.get_by_role("link", name="Getting started").click()
    page.wait_for_url("**/start", wait_until="load")
    page.get_by_label("Name").fill("store-9")
    page.get_by_label("Labels").fill("site=store-9 colour")
    page.get_by_role("button", name="Make a claim").click()
    expect(page.locator("#claim-problem")).to_contain_text("colour is not KEY=VALUE")
    page.get_by_label("Labels").fill("site=store-9")
    page.get_by_role("button", name="Make a claim").click()
    expect(page.locator("#claim-state")).to_contain_text("Waiting for the box")
    command = page.locator("#claim-made code").inner_text()
    assert "skerry-agent enroll" in command
    assert "<<'CLAIM'\nskn" in command, "a secret stands in no argument"
    [claim] = [one for one in world.api.call("GET", "/v1/claims", list[ClaimView]) if one.node == "store-9"]
    assert claim.labels == {"site": "store-9"}
    world.api.call("DELETE", f"/v1/claims/{claim.id}", object)
    expect(page.locator("#claim-state")).to_contain_text("withdrawn", timeout=LIVE_MS)
    assert visitor.complaints == []


@wide
def test_colours_are_chosen_and_stay_and_settings_tell_no_secret(visitor, world):
    page = visitor.log_in()
    page.get_by_role("link", name="Settings").click()
    expect(page.locator("main")).to_contain_text("keep_rollups_h")
    page.wait_for_load_state()  # its script stands by then
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_label("Colours").select_option("dark")
    dark = page.evaluate(ground)
    assert light != dark
    page.goto(world.fleet.url + "/nodes")
    assert page.evaluate(ground) == dark
    assert world.fleet.token not in page.content()
    page.goto(world.fleet.url + "/settings")
    page.get_by_label("Colours").select_option("")
    assert page.evaluate(ground) == light


@wide
def test_every_call_stands_on_the_page_of_the_api(visitor, world):
    page = visitor.log_in()
    page.goto(world.fleet.url + "/api")
    document = page.evaluate("fetch('/openapi.json').then((answer) => answer.json())")
    shown = page.locator("details").count()
    assert shown == sum(len(calls) for calls in document["paths"].values())
    page.locator("#show_fleet summary").click()
    expect(page.locator("#show_fleet")).to_contain_text("FleetView")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_keeps_out_who_can_not_see_or_has_no_mouse(visitor, world, width, scheme):
    page = visitor.log_in()
    page.emulate_media(color_scheme=scheme)
    found = {}
    for path in PATHS:
        page.goto(world.fleet.url + path)
        expect(page.locator("main")).to_be_visible()
        page.wait_for_timeout(300)
        shot(page, f"{path.strip('/').replace('/', '-') or 'fleet'}-{width}-{scheme}")
        across, seen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert across <= seen, f"{path} is {across} pixels wide of {seen}"
        violations = Axe().run(page).response["violations"]
        bad = [one for one in violations if one["impact"] in ("serious", "critical")]
        serious = [(one["id"], [node["html"][:200] for node in one["nodes"]][:3]) for one in bad]
        if serious:
            found[path] = serious
    assert found == {}
    assert visitor.complaints == []
    assert visitor.foreign() == []


# What is data, or a name of something, in whatever language: names, code, times, and what boxes and the planner say themselves.
IN_ENGLISH = """() => {
  const data = "bdi, code, pre, time, kbd, .mono, .brand, option, textarea, script, noscript, [lang=en], .map, .network, #verdict, #steps";
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const { parentElement, textContent } = walk.currentNode;
    if (parentElement.closest(data) || !parentElement.checkVisibility()) continue;
    if (/[A-Za-z]{3,}/.test(textContent.replace(WORDS, ""))) found.push(textContent.trim());
  }
  for (const element of document.querySelectorAll("[aria-label], [placeholder], [data-label], [data-what]"))
    for (const name of ["aria-label", "placeholder", "data-label", "data-what"]) {
      const text = element.getAttribute(name) ?? "";
      if (!element.closest("[lang=en]") && /[A-Za-z]{3,}/.test(text.replace(WORDS, ""))) found.push(`${name}: ${text}`);
    }
  return found;
}"""
NAMES = (
    "Skerry", "English", "MiB", "GiB", "CPU", "GPU", "API", "YAML", "JSON", "SHA-256", "p50", "p99", "ONNX", "OpenAPI", "JavaScript",
    "UTC", "skerry", "store-1", "store-2", "van-7", "cloud-1", "pixels-0", "pixels", "demo", "north", "road", "site", "store", "edge",
    "region", "state:lost", "version:", "FP32", "image", "colour", "ReduceMean", "cgroup1", "cgroup2", "engine", "rlimits", "deployment",
    "operator.token", "bubblewrap", "Tab", "Enter", "ssh", "Open Inference Protocol", "Triton", "KServe", "gvisor", "microvm", "nobody",
    "openapi.json", "GET", "PUT", "POST", "DELETE",
)  # fmt: skip


@wide
def test_the_console_speaks_chinese_where_the_browser_does_or_somebody_chose_it(visitor, world):
    visitor.context.set_extra_http_headers({"Accept-Language": "fr, zh-CN;q=0.9, en;q=0.5"})
    page = visitor.log_in()
    words = "/" + "|".join(sorted(map(re.escape, NAMES), key=len, reverse=True)).replace("/", r"\/") + "/g"
    left = {}
    for path in (*PATHS, "/nodes?q=state:lost", "/nodes/nobody", "/deployments/pixels/edit"):
        page.goto(world.fleet.url + path)
        expect(page.locator("html")).to_have_attribute("lang", "zh-Hans")
        page.wait_for_timeout(1200)
        shot(page, f"zh-{path.strip('/').replace('/', '-').replace('?', '-').replace(':', '-') or 'fleet'}")
        if found := page.evaluate(IN_ENGLISH.replace("WORDS", words)):
            left[path] = found
    assert not left, json.dumps(left, ensure_ascii=False)[:6000]
    page.goto(world.fleet.url + "/nodes?q=store")
    page.get_by_role("link", name="English").click()
    page.wait_for_url("**/nodes?q=store")
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(page.locator("h1")).to_contain_text("4 boxes")
    page.goto(world.fleet.url + "/language/zh?next=//evil.example/")
    page.wait_for_url(world.fleet.url + "/")
    expect(page.locator("#headline")).to_contain_text("一切正常", timeout=LIVE_MS)
    assert page.goto(world.fleet.url + "/language/tlh").status == 404
    assert visitor.foreign() == []
