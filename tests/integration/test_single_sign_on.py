"""People who are known elsewhere: a real provider lets them in with the role of their groups, and one that lies lets in nobody."""

import json
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from skerry.demo.fleet import free_ports
from tests.e2e.world import wait_until
from tests.integration.test_accounts import OPENER, PASSWORD, Answer, Coordinator

CLIENT = "skerry-reef"
PEOPLE = {
    "s1": {"preferred_username": "Ada", "groups": ["staff", "reef-admins"]},
    "s2": {"preferred_username": "otto", "groups": ["reef-operators"]},
    "s3": {"preferred_username": "vera", "groups": "reef-viewers"},
    "s4": {"preferred_username": "nobody", "groups": ["staff"]},
    "s5": {"preferred_username": "root", "groups": ["reef-admins"]},
    "s6": {"preferred_username": "(operator)", "groups": ["reef-admins"]},
}
GROUPS = 'admins = ["reef-admins"]\noperators = ["reef-operators"]\nviewers = ["reef-viewers"]\n'


def coordinator_for(folder: Path, issuer: str) -> Coordinator:
    """One that trusts the provider there, with an administrator of its own called root."""
    coordinator = Coordinator(folder)
    (folder / "secret").write_text("hush\n")
    with coordinator.config.open("a") as file:
        file.write(f'[openid_connect]\nissuer = "{issuer}"\nclient_id = "{CLIENT}"\nclient_secret_file = "{folder}/secret"\n')
        file.write(f'title = "the harbour office"\nscopes = ["openid", "profile"]\n{GROUPS}')
    try:
        coordinator.start()
        assert coordinator.accept(coordinator.admin_link(), "root").status == 200
    except BaseException:
        coordinator.stop()
        raise
    return coordinator


def cookie_of(answer: Answer, name: str) -> str:
    found = [value.split(";")[0] for value in answer.headers.get_all("Set-Cookie", []) if value.startswith(f"{name}=")]
    return found[0] if found else ""


def begin(coordinator: Coordinator, after: str = "/events") -> tuple[str, str]:
    """Where the browser is sent, and the cookie that it got."""
    answer = coordinator.ask("GET", f"/login/elsewhere?next={urllib.parse.quote(after, safe='')}")
    assert answer.status == 303, answer.text
    (attributes,) = [value for value in answer.headers.get_all("Set-Cookie") if value.startswith("skerry_login=")]
    assert "HttpOnly" in attributes
    assert "SameSite=Lax" in attributes
    return answer.headers["Location"], cookie_of(answer, "skerry_login")


def path_of(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return f"{parts.path}?{parts.query}"


# -- a real provider


@pytest.fixture(scope="module")
def provider(tmp_path_factory) -> Iterator[str]:
    """Its issuer."""
    (port,) = free_ports(1)
    people = [word for sub, claims in PEOPLE.items() for word in ("--user-claims", json.dumps({"sub": sub, **claims}))]
    log = (tmp_path_factory.mktemp("provider") / "log").open("wb")
    process = subprocess.Popen([sys.executable, "-m", "oidc_provider_mock", "--port", str(port), *people], stdout=log, stderr=log)
    issuer = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        try:
            with urllib.request.urlopen(f"{issuer}/.well-known/openid-configuration", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    try:
        wait_until(is_up, 30)
        yield issuer
    finally:
        process.terminate()
        process.wait(10)
        log.close()


@pytest.fixture(scope="module")
def coordinator(provider, tmp_path_factory) -> Iterator[Coordinator]:
    coordinator = coordinator_for(tmp_path_factory.mktemp("reef"), provider)
    yield coordinator
    coordinator.stop()


def authorised(url: str, sub: str) -> str:
    """What the provider's page sends the browser back to, once ``sub`` said yes."""
    request = urllib.request.Request(url, method="POST", data=urllib.parse.urlencode({"sub": sub}).encode())
    with pytest.raises(urllib.error.HTTPError) as sent_back:  # no redirect is followed
        OPENER.open(request, timeout=20)
    sent_back.value.close()
    assert sent_back.value.code in (302, 303)
    return str(sent_back.value.headers["Location"])


def came_in(coordinator: Coordinator, sub: str) -> Answer:
    url, cookie = begin(coordinator)
    return coordinator.ask("GET", path_of(authorised(url, sub)), cookie=cookie)


def me(coordinator: Coordinator, answer: Answer) -> dict[str, Any]:
    return dict(coordinator.ask("GET", "/v1/me", cookie=cookie_of(answer, "skerry_session")).json)


@pytest.mark.parametrize(("sub", "name", "role"), [("s1", "ada", "admin"), ("s2", "otto", "operator"), ("s3", "vera", "viewer")])
def test_somebody_who_is_known_there_is_let_in_with_the_role_of_their_groups(coordinator, sub, name, role):
    answer = came_in(coordinator, sub)
    assert answer.status == 200, answer.text
    assert 'url=/events"' in answer.text
    known = me(coordinator, answer)
    assert (known["name"], known["role"]) == (name, role)
    assert me(coordinator, came_in(coordinator, sub)) == known, "and is the same one the next time"


def test_the_login_page_offers_it(coordinator):
    assert "Log in with the harbour office" in coordinator.ask("GET", "/login").text


def test_who_has_no_group_of_ours_or_no_name_for_here_is_not_let_in(coordinator):
    for sub, words in (("s4", "has no role here"), ("s6", "nothing that can be a name")):
        answer = came_in(coordinator, sub)
        assert (answer.status, cookie_of(answer, "skerry_session")) == (403, "")
        assert words in answer.text


def test_nobody_becomes_somebody_else_by_choosing_their_name_there(coordinator):
    answer = came_in(coordinator, "s5")
    assert (answer.status, cookie_of(answer, "skerry_session")) == (403, "")
    assert "somebody else here" in answer.text
    assert coordinator.token_of("root", PASSWORD)


def test_a_group_that_was_taken_away_is_gone_at_the_next_login_and_it_is_on_record(coordinator, provider):
    came_in(coordinator, "s2")
    claims = {"preferred_username": "otto", "groups": ["reef-viewers"]}
    request = urllib.request.Request(
        f"{provider}/users/s2", method="PUT", data=json.dumps(claims).encode(), headers={"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=10).close()
    assert me(coordinator, came_in(coordinator, "s2"))["role"] == "viewer"
    records = coordinator.ask("GET", "/v1/audit?subject=otto", token=coordinator.token_of("root")).json["records"]
    told = {record["action"]: (record["via"], record["before"], record["after"]) for record in records}
    assert told["user.role"] == ("single sign-on", "role operator", "role viewer")
    assert told["user.known"][0] == "single sign-on"
    assert coordinator.ask("DELETE", "/v1/users/otto", token=coordinator.token_of("root")).status == 204


def test_an_answer_is_for_the_browser_that_began_and_good_once(coordinator):
    url, cookie = begin(coordinator)
    back = path_of(authorised(url, "s1"))
    for stranger in ("", "skerry_login=guessed", begin(coordinator)[1]):
        answer = coordinator.ask("GET", back, cookie=stranger)
        assert (answer.status, cookie_of(answer, "skerry_session")) == (403, "")
    assert coordinator.ask("GET", back, cookie=cookie).status == 403, "the state was spent by whoever tried first"
    again, cookie = begin(coordinator)
    back = path_of(authorised(again, "s1"))
    assert coordinator.ask("GET", back, cookie=cookie).status == 200
    assert coordinator.ask("GET", back, cookie=cookie).status == 403


def test_it_leads_to_no_other_site(coordinator):
    for after in ("//evil.example", "https://evil.example/", "/\\evil.example"):
        url, cookie = begin(coordinator, after)
        assert 'url=/"' in coordinator.ask("GET", path_of(authorised(url, "s1")), cookie=cookie).text


# -- one that lies

KEY, OTHER_KEY = (rsa.generate_private_key(65537, 2048) for _ in range(2))


class Liar(ThreadingHTTPServer):
    """A provider whose ID tokens are whatever ``token`` makes of the right claims."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), LiarsHandler)
        self.issuer = f"http://127.0.0.1:{self.server_port}"
        self.token: Callable[[dict[str, Any]], str] = lambda claims: jwt.encode(claims, KEY, "RS256", headers={"kid": "k"})
        self.nonce = ""
        self.asked: dict[str, str] = {}


class LiarsHandler(BaseHTTPRequestHandler):
    server: Liar

    def log_message(self, *_: object) -> None: ...

    def _answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        issuer = self.server.issuer
        if self.path == "/keys":
            public = json.loads(RSAAlgorithm.to_jwk(KEY.public_key()))
            self._answer({"keys": [{**public, "kid": "k", "use": "sig", "alg": "RS256"}]})
        else:
            names = ("authorization_endpoint", "token_endpoint", "jwks_uri")
            self._answer({"issuer": issuer, **dict(zip(names, (f"{issuer}/go", f"{issuer}/token", f"{issuer}/keys"), strict=True))})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked = dict(urllib.parse.parse_qsl(body.decode()))
        now = int(time.time())
        claims = {
            "iss": self.server.issuer, "aud": CLIENT, "sub": "s9", "iat": now, "exp": now + 300, "nonce": self.server.nonce,
            "preferred_username": "lena", "groups": ["reef-admins"],
        }  # fmt: skip
        self._answer({"access_token": "x", "token_type": "Bearer", "id_token": self.server.token(claims)})


@pytest.fixture(scope="module")
def liar() -> Iterator[Liar]:
    liar = Liar()
    thread = threading.Thread(target=liar.serve_forever)
    thread.start()
    yield liar
    liar.shutdown()
    thread.join()
    liar.server_close()


@pytest.fixture(scope="module")
def lied_to(liar, tmp_path_factory) -> Iterator[Coordinator]:
    coordinator = coordinator_for(tmp_path_factory.mktemp("lied"), liar.issuer)
    yield coordinator
    coordinator.stop()


def signed(claims: dict[str, Any], key: Any = KEY, algorithm: str = "RS256", kid: str = "k") -> str:
    return jwt.encode(claims, key, algorithm, headers={"kid": kid})


LIES: dict[str, Callable[[dict[str, Any]], str]] = {
    "another key": lambda claims: signed(claims, OTHER_KEY),
    "a key that is not listed": lambda claims: signed(claims, kid="other"),
    "no signature": lambda claims: jwt.encode(claims, None, "none", headers={"kid": "k"}),
    "the client's secret as the key": lambda claims: signed(claims, "hush" * 8, "HS256"),
    "another nonce": lambda claims: signed({**claims, "nonce": "other"}),
    "no nonce": lambda claims: signed({key: value for key, value in claims.items() if key != "nonce"}),
    "another audience": lambda claims: signed({**claims, "aud": "other"}),
    "for another program": lambda claims: signed({**claims, "aud": [CLIENT, "other"], "azp": "other"}),
    "another issuer": lambda claims: signed({**claims, "iss": "https://evil.example"}),
    "over": lambda claims: signed({**claims, "exp": int(time.time()) - 3600}),
    "without an end": lambda claims: signed({key: value for key, value in claims.items() if key != "exp"}),
    "no subject": lambda claims: signed({key: value for key, value in claims.items() if key != "sub"}),
    "no token": lambda _: "nonsense",
}


def answered(coordinator: Coordinator, liar: Liar, **more: str) -> Answer:
    url, cookie = begin(coordinator)
    query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))
    liar.nonce = query["nonce"]
    back = urllib.parse.urlencode({"code": "c", "state": query["state"], **more})
    return coordinator.ask("GET", f"/login/back?{back}", cookie=cookie)


@pytest.mark.parametrize("lie", LIES)
def test_a_token_that_is_not_right_lets_nobody_in(lied_to, liar, lie):
    liar.token = LIES[lie]
    answer = answered(lied_to, liar)
    assert (answer.status, cookie_of(answer, "skerry_session")) == (403, "")
    liar.token = signed
    assert answered(lied_to, liar).status == 200, "while the same without the lie does"


def test_an_answer_that_names_another_provider_or_an_error_lets_nobody_in(lied_to, liar):
    liar.token = signed
    for more in ({"iss": "https://evil.example"}, {"error": "access_denied"}):
        assert answered(lied_to, liar, **more).status == 403
    assert liar.asked["client_secret"] == "hush"
    assert len(liar.asked["code_verifier"]) >= 43


def test_a_provider_that_is_away_is_said_to_be_and_passwords_still_let_in(tmp_path):
    (port,) = free_ports(1)
    coordinator = coordinator_for(tmp_path, f"http://127.0.0.1:{port}")
    try:
        answer = coordinator.ask("GET", "/login/elsewhere")
        assert answer.status == 403
        assert "can&#39;t be asked now" in answer.text
        assert coordinator.token_of("root", PASSWORD)
        assert "hush" not in (tmp_path / "log").read_text()
    finally:
        coordinator.stop()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ('issuer = "http://id.example.org"', "is not https://"),
        ('issuer = "https://id.example.org"\nadmins = []\noperators = []\nviewers = []', "without a group nobody is let in"),
    ],
)
def test_settings_that_would_let_in_anybody_or_nobody_are_refused(tmp_path, changed, words):
    coordinator = Coordinator(tmp_path)
    with coordinator.config.open("a") as file:
        file.write(f'[openid_connect]\nclient_id = "c"\n{changed}\n')
        if "admins" not in changed:
            file.write(GROUPS)
    done = subprocess.run(
        [sys.executable, "-m", "coordinator", "--check", "--config", str(coordinator.config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    assert words in done.stderr
