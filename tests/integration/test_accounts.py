"""A real coordinator, and who may look and act there: strangers, viewers, operators, admins, and those who were removed."""

import json
import re
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skerry.demo.fleet import free_ports
from tests.e2e.world import wait_until

PASSWORD = "seven red lighthouses"
OPEN = {("GET", "/v1/ca"), ("POST", "/v1/enroll"), ("POST", "/v1/renew"), ("POST", "/v1/login")}
OWN = {("POST", "/v1/login-links"), ("POST", "/v1/tokens"), ("DELETE", "/v1/tokens/{id}")}
PAGES = (
    "/",
    "/nodes",
    "/nodes/x",
    "/deployments/x",
    "/models",
    "/rollouts",
    "/events",
    "/account",
    "/users",
    "/audit",
    "/nowhere",
    "/openapi.json",
)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


OPENER = urllib.request.build_opener(NoRedirect)


class Answer:
    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def cookie(self) -> str:
        return str(self.headers["Set-Cookie"]).split(";")[0]


class Coordinator:
    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state"
        port, broker = free_ports(2)
        self.url = f"http://127.0.0.1:{port}"
        self.config = folder / "coordinator.toml"
        self.config.write_text(
            f'fleet = "reef"\nstate_dir = "{self.state}"\nlisten = "127.0.0.1:{port}"\npublic_url = "{self.url}"\n'
            f'[broker]\nhost = "127.0.0.1"\nport = {broker}\n'
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "coordinator", "--config", str(self.config)], stdout=log, stderr=log)
        wait_until(self.is_up, 20, (self.folder / "log").read_text)

    def is_up(self) -> bool:
        try:
            return self.ask("GET", "/healthz").status == 200
        except OSError:
            return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)

    def ask(self, method: str, path: str, body: object = None, *, token: str = "", cookie: str = "", **headers: str) -> Answer:
        """``body``: bytes as they are, a dict of texts for a console page as a form, anything else as JSON."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            sent["Authorization"] = f"Bearer {token}"
        if cookie:
            sent["Cookie"] = cookie
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if isinstance(body, dict) and not path.startswith("/v1/"):
            data = urllib.parse.urlencode(body).encode()
        request = urllib.request.Request(self.url + path, method=method, headers=sent, data=data)
        try:
            with OPENER.open(request, timeout=20) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as exc:
            return Answer(exc.code, exc.headers, exc.read())

    @property
    def operator(self) -> str:
        return (self.state / "operator.token").read_text().strip()

    def admin_link(self) -> str:
        """The code of a link for the machine's owner."""
        command = [sys.executable, "-m", "coordinator", "admin-link", "--config", str(self.config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip().partition("?code=")[2]

    def accept(self, code: str, name: str = "", password: str = PASSWORD) -> Answer:
        return self.ask("POST", "/welcome", {"code": code, "name": name, "password": password, "again": password})

    def token_of(self, name: str, password: str = PASSWORD) -> str:
        made = self.ask("POST", "/v1/login", {"name": name, "password": password})
        assert made.status == 201, made.text
        return str(made.json["token"])

    def cli(self, *arguments: str, token: str) -> subprocess.CompletedProcess[str]:
        env = {"SKERRY_URL": self.url, "SKERRY_TOKEN": token, "PATH": "/usr/bin:/bin", "COLUMNS": "200", "HOME": str(self.folder)}
        return subprocess.run(
            [sys.executable, "-m", "skerry", *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
        )


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory) -> Iterator[Coordinator]:
    coordinator = Coordinator(tmp_path_factory.mktemp("accounts"))
    coordinator.start()
    try:
        assert coordinator.accept(coordinator.admin_link(), "root").status == 200
        yield coordinator
    finally:
        coordinator.stop()


@pytest.fixture(scope="module")
def admin(coordinator) -> str:
    return coordinator.token_of("root")


def user(coordinator: Coordinator, admin: str, name: str, role: str) -> str:
    """Somebody new; a token of theirs."""
    invited = coordinator.ask("POST", "/v1/users", {"name": name, "role": role}, token=admin)
    assert invited.status == 201, invited.text
    assert coordinator.accept(invited.json["url"].partition("?code=")[2]).status == 200
    return coordinator.token_of(name)


def session(coordinator: Coordinator, name: str) -> tuple[str, str]:
    """A browser's cookie and the CSRF token of its pages."""
    answer = coordinator.ask("POST", "/login", {"name": name, "password": PASSWORD})
    assert answer.status == 303, answer.text
    page = coordinator.ask("GET", "/account", cookie=answer.cookie)
    found = re.search(r'name="csrf" value="([0-9a-f]{64})"', page.text)
    assert found is not None, page.text
    return answer.cookie, found[1]


def calls(coordinator: Coordinator) -> list[tuple[str, str]]:
    paths = coordinator.ask("GET", "/openapi.json", token=coordinator.operator).json["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def filled(path: str) -> str:
    return re.sub(r"\{version\}", "1", re.sub(r"\{(?!version)\w+\}", "nothing", path))


def test_a_link_makes_one_administrator_and_only_the_newest_link_does(coordinator):
    older, newer = coordinator.admin_link(), coordinator.admin_link()
    assert coordinator.accept(older, "mallory").status == 403
    assert coordinator.accept(newer, "Not A Name!").status == 422
    assert coordinator.accept(newer, "short", "x" * 11).status == 422
    assert coordinator.accept(newer, "second").status == 200
    assert coordinator.accept(newer, "third").status == 403
    assert coordinator.ask("GET", f"/welcome?code={newer}").status == 403
    assert coordinator.ask("GET", "/v1/me", token=coordinator.token_of("second")).json["role"] == "admin"
    assert coordinator.ask("POST", "/v1/login", {"name": "third", "password": PASSWORD}).status == 401


def test_nothing_is_reached_without_a_login_but_health_enrolment_and_the_login_page(coordinator):
    every = calls(coordinator)
    assert len(every) > 25
    for method, path in every:
        answer = coordinator.ask(method, filled(path), b"{}" if method in ("POST", "PUT") else None)
        is_open = (method, path) in OPEN and answer.status != 401
        is_open = is_open or (path == "/v1/login" and answer.status == 422)
        assert is_open or ((method, path) not in OPEN and answer.status == 401), (method, path, answer.status)
    for path in PAGES:
        answer = coordinator.ask("GET", path)
        assert answer.status in (303, 401), path
        assert answer.status == 401 or answer.headers["Location"].startswith("/login"), path
    for path in ("/healthz", "/login", "/static/console.css"):
        assert coordinator.ask("GET", path).status == 200


def test_a_viewer_sees_and_changes_nothing_and_an_operator_says_nothing_about_people(coordinator, admin):
    viewer, operator = user(coordinator, admin, "vera", "viewer"), user(coordinator, admin, "otto", "operator")
    for method, path in calls(coordinator):
        if (method, path) in OPEN | OWN or path == "/v1/stream":
            continue
        body = b"{}" if method in ("POST", "PUT") else None
        secret = path in ("/v1/users", "/v1/audit", "/v1/claims") or "logs" in path or "artifacts" in path
        status = coordinator.ask(method, filled(path), body, token=viewer).status
        assert (status == 403) == (method != "GET" or secret), (method, path, status)
        status = coordinator.ask(method, filled(path), body, token=operator).status
        assert (status == 403) == path.startswith("/v1/users"), (method, path, status)
    assert coordinator.ask("POST", "/v1/users", {"name": "eve", "role": "admin"}, token=coordinator.operator).status == 403


def test_a_browser_changes_something_only_from_a_page_of_its_own_session(coordinator, admin):
    user(coordinator, admin, "brow", "operator")
    (cookie, csrf), (_, other_csrf) = session(coordinator, "brow"), session(coordinator, "brow")
    assert coordinator.ask("GET", "/v1/status", cookie=cookie).status == 200
    assert coordinator.ask("POST", "/v1/claims", {}, cookie=cookie).status == 401
    assert coordinator.ask("POST", "/v1/claims", {}, cookie=cookie, X_CSRF_Token=other_csrf).status == 401
    assert coordinator.ask("POST", "/v1/claims", {}, cookie=cookie, X_CSRF_Token=csrf).status == 201
    form = {"title": "by a form", "role": "viewer", "days": "7"}
    for more, headers in (({}, {}), ({"csrf": other_csrf}, {}), ({"csrf": csrf}, {"Origin": "https://evil.example"})):
        refused = coordinator.ask("POST", "/account/tokens", form | more, cookie=cookie, **headers)
        assert refused.status == 403
        assert "Nothing was changed" in refused.text
    made = coordinator.ask("POST", "/account/tokens", form | {"csrf": csrf}, cookie=cookie, Origin=coordinator.url)
    token = re.search(r"skt_[0-9a-f]{8}_[\w-]{43}", made.text)
    assert token is not None
    assert coordinator.ask("GET", "/v1/me", token=token[0]).json["role"] == "viewer"
    assert coordinator.ask("POST", "/logout", {}, cookie=cookie).status == 403
    assert coordinator.ask("POST", "/logout", {"csrf": csrf}, cookie=cookie).status == 303
    assert coordinator.ask("GET", "/v1/status", cookie=cookie).status == 401, "the session is over at the coordinator, too"


def test_the_session_cookie_is_for_no_script_and_no_other_site(coordinator, admin):
    user(coordinator, admin, "cook", "viewer")
    answer = coordinator.ask("POST", "/login", {"name": "cook", "password": PASSWORD})
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in answer.headers["Set-Cookie"].split(";")}
    foreign = coordinator.ask("POST", "/login", {"name": "cook", "password": PASSWORD}, Origin="https://evil.example")
    assert foreign.status == 403
    assert foreign.headers["Set-Cookie"] is None
    page = coordinator.ask("GET", "/account", cookie=answer.cookie)
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert not re.findall(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", page.text)


def test_who_is_removed_or_made_less_is_so_at_once_in_sessions_and_tokens_that_stand(coordinator, admin):
    token = user(coordinator, admin, "gone", "operator")
    cookie, _ = session(coordinator, "gone")
    own = coordinator.ask("POST", "/v1/tokens", {"title": "ci", "role": "operator"}, token=token).json["token"]
    assert coordinator.ask("PUT", "/v1/users/gone/role", {"role": "viewer"}, token=admin).status == 204
    for credential in ({"token": token}, {"token": own}, {"cookie": cookie}):
        assert coordinator.ask("GET", "/v1/me", **credential).json["role"] == "viewer"
        assert coordinator.ask("GET", "/v1/audit", **credential).status == 403
    assert coordinator.ask("DELETE", "/v1/users/gone", token=admin).status == 204
    for credential in ({"token": token}, {"token": own}, {"cookie": cookie}):
        assert coordinator.ask("GET", "/v1/me", **credential).status == 401
    assert coordinator.ask("POST", "/v1/login", {"name": "gone", "password": PASSWORD}).status == 401
    again = user(coordinator, admin, "gone", "viewer")
    assert coordinator.ask("GET", "/v1/me", token=again).status == 200
    assert coordinator.ask("GET", "/v1/me", token=own).status == 401, "a namesake does not inherit tokens"


def test_a_token_may_do_at_most_what_its_maker_may_and_ends(coordinator, admin):
    token = user(coordinator, admin, "maker", "operator")
    refused = coordinator.ask("POST", "/v1/tokens", {"title": "up", "role": "admin"}, token=token)
    assert (refused.status, refused.json["error"]["field"]) == (403, "role")
    viewer = coordinator.ask("POST", "/v1/tokens", {"title": "down", "role": "viewer"}, token=token).json
    assert coordinator.ask("POST", "/v1/tokens", {"title": "up again", "role": "operator"}, token=viewer["token"]).status == 403
    assert coordinator.ask("POST", "/v1/tokens", {"title": "long", "role": "viewer", "expires_s": 10**9}, token=token).status == 422
    other = user(coordinator, admin, "neighbour", "operator")
    assert coordinator.ask("DELETE", f"/v1/tokens/{viewer['id']}", token=other).status == 404
    assert coordinator.ask("GET", "/v1/me", token=viewer["token"][:-1] + "A").status in (401, 200 if viewer["token"][-1] == "A" else 401)
    assert coordinator.ask("DELETE", f"/v1/tokens/{viewer['id']}", token=token).status == 204
    assert coordinator.ask("GET", "/v1/me", token=viewer["token"]).status == 401
    assert viewer["id"] not in {view["id"] for view in coordinator.ask("GET", "/v1/tokens", token=token).json}


def test_a_browser_that_came_in_by_a_token_may_no_more_than_the_token_and_no_longer(coordinator, admin):
    made = coordinator.ask("POST", "/v1/tokens", {"title": "a wall screen", "role": "viewer"}, token=admin).json
    link = coordinator.ask("POST", "/v1/login-links", token=made["token"]).json["url"].removeprefix(coordinator.url)
    by_link, by_form = coordinator.ask("GET", link), coordinator.ask("POST", "/login", {"token": made["token"]})
    assert (by_link.status, by_form.status) == (200, 303)
    unused = coordinator.ask("POST", "/v1/login-links", token=made["token"]).json["url"].removeprefix(coordinator.url)
    for cookie in (by_link.cookie, by_form.cookie):
        assert coordinator.ask("GET", "/v1/me", cookie=cookie).json == {"name": "root", "role": "viewer", "via": "session"}
        assert coordinator.ask("GET", "/users", cookie=cookie).status == 403
    assert coordinator.ask("DELETE", f"/v1/tokens/{made['id']}", token=admin).status == 204
    late = coordinator.ask("GET", unused)
    for cookie in (by_link.cookie, by_form.cookie, late.cookie if late.status == 200 else "skerry_session=x"):
        assert coordinator.ask("GET", "/v1/me", cookie=cookie).status == 401


def test_the_last_admin_who_can_log_in_stays(coordinator, admin):
    for name in ("second",):
        coordinator.ask("DELETE", f"/v1/users/{name}", token=admin)
    coordinator.ask("POST", "/v1/users", {"name": "not-yet", "role": "admin"}, token=admin)
    for method, path, body in (("DELETE", "/v1/users/root", None), ("PUT", "/v1/users/root/role", {"role": "viewer"})):
        refused = coordinator.ask(method, path, body, token=admin)
        assert (refused.status, refused.json["error"]["code"]) == (409, "last_admin")


def test_a_new_password_ends_all_other_sessions(coordinator, admin):
    user(coordinator, admin, "pass", "viewer")
    (cookie, csrf), (other, _) = session(coordinator, "pass"), session(coordinator, "pass")
    form = {"csrf": csrf, "old": "not the old one", "new": "nine green buoys", "again": "nine green buoys"}
    assert coordinator.ask("POST", "/account/password", form, cookie=cookie).status == 403
    changed = coordinator.ask("POST", "/account/password", form | {"old": PASSWORD}, cookie=cookie)
    assert changed.status == 303
    assert [coordinator.ask("GET", "/v1/me", cookie=one).status for one in (cookie, other, changed.cookie)] == [401, 401, 200]
    assert coordinator.ask("POST", "/v1/login", {"name": "pass", "password": PASSWORD}).status == 401
    assert coordinator.token_of("pass", "nine green buoys")


def test_no_secret_lies_in_the_registry_or_the_log_and_all_stands_after_a_restart(coordinator, admin):
    token = user(coordinator, admin, "kept", "viewer")
    cookie, csrf = session(coordinator, "kept")
    link = coordinator.ask("POST", "/v1/users", {"name": "later", "role": "viewer"}, token=admin).json["url"].partition("?code=")[2]
    coordinator.stop()
    files = [path for path in coordinator.folder.rglob("*") if path.is_file() and path.suffix != ".token"]
    assert any(path.name.startswith("registry.db") for path in files)
    for secret in (PASSWORD, token[-24:], cookie.partition("=")[2], csrf, link):
        assert not [path for path in files if secret.encode() in path.read_bytes()], "a secret was written down"
    with sqlite3.connect(coordinator.state / "registry.db") as registry:
        assert {row[0][:10] for row in registry.execute("SELECT password_hash FROM users WHERE password_hash != ''")} == {"$argon2id$"}
    coordinator.start()
    for credential in ({"token": token}, {"cookie": cookie}):
        assert coordinator.ask("GET", "/v1/me", **credential).json["name"] == "kept"
    assert coordinator.accept(link).status == 200


def test_every_change_is_on_record_with_who_made_it_and_what_was_before(coordinator, admin):
    otto = user(coordinator, admin, "writer", "operator")
    made = coordinator.ask("POST", "/v1/claims", {"labels": {"site": "pier"}}, token=otto).json["id"]
    assert coordinator.ask("DELETE", f"/v1/claims/{made}", token=coordinator.operator).status == 204
    coordinator.ask("PUT", "/v1/users/writer/role", {"role": "viewer"}, token=admin)
    records = coordinator.ask("GET", "/v1/audit?limit=1000", token=admin).json["records"]
    assert [record["id"] for record in records] == sorted((record["id"] for record in records), reverse=True)
    about = {(r["action"], r["who"], r["subject"], r["before"], r["after"]) for r in records}
    assert ("claim.made", "writer", made, "", "tier edge, labels site=pier, 86400 s") in about
    assert ("claim.withdrawn", "(operator)", made, "", "") in about
    assert ("user.role", "root", "writer", "role operator", "role viewer") in about
    assert {"user.invited", "user.password", "session.begun", "token.made"} <= {record["action"] for record in records}
    assert {record["address"] for record in records} == {"127.0.0.1"}
    narrowed = coordinator.ask("GET", f"/v1/audit?subject={made}", token=admin).json["records"]
    assert [record["action"] for record in narrowed] == ["claim.withdrawn", "claim.made"]


def test_a_record_that_was_changed_or_removed_is_found(coordinator, admin):
    done = coordinator.cli("audit", "verify", token=admin)
    assert done.returncode == 0, done.stderr
    known = re.search(r"note (\d+:[0-9a-f]{64})", done.stdout)
    assert known is not None
    export = coordinator.folder / "audit.jsonl"
    export.write_text(coordinator.cli("audit", "export", token=admin).stdout)
    lines = export.read_text().splitlines()
    assert len(lines) >= int(known[1].partition(":")[0]) > 20
    assert coordinator.cli("audit", "verify", "--file", str(export), "--known", known[1], token="").returncode == 0
    cases = {
        "was changed": [*lines[:4], lines[4].replace('"who":"', '"who":"not-'), *lines[5:]],
        "is missing": [*lines[:4], *lines[5:]],
        "was there when": lines[:-3],
    }
    for words, tampered in cases.items():
        export.write_text("\n".join(tampered) + "\n")
        found = coordinator.cli("audit", "verify", "--file", str(export), "--known", known[1], token="")
        assert found.returncode == 1, words
        assert words in found.stderr

    coordinator.stop()
    with sqlite3.connect(coordinator.state / "registry.db") as registry:
        for statement in ("UPDATE audit SET who = 'x' WHERE id = 3", "DELETE FROM audit WHERE id = 3"):
            with pytest.raises(sqlite3.IntegrityError, match="audit records are not"):
                registry.execute(statement)
        registry.execute("DROP TRIGGER audit_is_not_removed")
        registry.execute("DELETE FROM audit WHERE id = (SELECT max(id) FROM audit)")
        registry.commit()
    coordinator.start()
    found = coordinator.cli("audit", "verify", token=coordinator.operator)
    assert found.returncode == 1
    assert "the end is missing" in found.stderr
    assert coordinator.ask("POST", "/v1/claims", {}, token=coordinator.operator).status == 201
    found = coordinator.cli("audit", "verify", token=coordinator.operator)
    assert found.returncode == 1
    assert "is missing" in found.stderr, "what is written later does not take its place"


def test_guessing_is_slowed_down_for_the_right_password_too(coordinator, admin):
    """The last test: this address is shut out afterwards."""
    user(coordinator, admin, "target", "viewer")
    answers = [coordinator.ask("POST", "/v1/login", {"name": "target", "password": f"guess {i}"}) for i in range(14)]
    assert {answer.status for answer in answers[:5]} == {401}
    assert [answer.status for answer in answers[-3:]] == [429] * 3
    assert 0 < int(answers[-1].headers["Retry-After"]) <= 600
    assert coordinator.ask("POST", "/v1/login", {"name": "target", "password": PASSWORD}).status == 429
    assert coordinator.ask("POST", "/login", {"name": "nobody", "password": "x"}).status == 429
    assert coordinator.ask("GET", "/v1/me", token=admin).status == 200, "whoever is in stays in"


def test_listening_beyond_this_machine_without_tls_is_refused_unless_said(tmp_path):
    for listen, more, is_fine in (
        ("0.0.0.0:8080", "", False), ("[::]:8080", "", False), ("fleet.example:8080", "", False), (":8080", "", False),
        ("127.0.0.1:8080", "", True), ("localhost:8080", "", True), ("[::1]:8080", "", True),
        ("0.0.0.0:8080", "plain_http = true\n", True), ("0.0.0.0:8080", "tls = true\n", True),
    ):  # fmt: skip
        config = tmp_path / "c.toml"
        config.write_text(
            f'fleet = "f"\nstate_dir = "{tmp_path}"\nlisten = "{listen}"\npublic_url = "http://x"\n{more}[broker]\nhost = "127.0.0.1"\n'
        )
        done = subprocess.run(
            [sys.executable, "-m", "coordinator", "--config", config, "--check"], capture_output=True, text=True, timeout=30, check=False
        )
        assert (done.returncode == 0) == is_fine, (listen, more, done.stderr)
        assert is_fine or "plain_http = true" in done.stderr
