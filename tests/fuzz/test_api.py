"""The coordinator's API against its own OpenAPI document: whatever is sent, it answers what the document says, and no call fails inside."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from coordinator.api.openapi import document
from tests.integration.test_accounts import Coordinator

MOST_ANSWER_S = 15.0
MEANT = (400, 409, 422)
"""What fits the document may still mean nothing here: a model that is not in the store, a name that is taken. The answer says which."""
SCHEMA = schemathesis.openapi.from_dict(document())
CALLS = [(method, path) for path, calls in document()["paths"].items() for method in calls if path != "/v1/stream"]
"""All but the stream, which does not end."""


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory) -> Iterator[Coordinator]:
    coordinator = Coordinator(tmp_path_factory.mktemp("api"))
    coordinator.start()
    try:
        assert coordinator.accept(coordinator.admin_link(), "root").status == 200
        yield coordinator
        assert coordinator.ask("GET", "/healthz").status == 200, "it lives"
    finally:
        coordinator.stop()


@pytest.fixture(scope="module")
def admin(coordinator) -> str:
    return coordinator.token_of("root")


@pytest.mark.parametrize(("method", "path"), CALLS, ids=lambda value: str(value).strip("/").replace("/", "-"))
def test_a_call_answers_as_its_document_says(coordinator, admin, method, path):
    seen = set()

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(SCHEMA[path][method].as_strategy())
    def whatever_is_sent(case: schemathesis.Case) -> None:
        answer = case.call(base_url=coordinator.url, headers={"Authorization": f"Bearer {admin}"}, timeout=MOST_ANSWER_S)
        case.validate_response(answer, excluded_checks=[positive_data_acceptance] if answer.status_code in MEANT else [])
        seen.add(answer.status_code)

    whatever_is_sent()
    assert seen - {401, 403}, f"nothing got past the login: {seen}"
