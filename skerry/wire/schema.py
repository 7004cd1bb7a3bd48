"""The wire's messages as one JSON Schema: ``python -m skerry.wire.schema > skerry/wire/schema.json`` after a change to them."""

import json
import sys
from typing import Any

import msgspec

from skerry.wire.messages import MESSAGES, SCHEMA_VERSION


def document() -> dict[str, Any]:
    """The schema of every message, and of what they are made of, under the version that travels with them."""
    messages, definitions = msgspec.json.schema_components(MESSAGES, ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Skerry's messages between box and coordinator",
        "schema_version": SCHEMA_VERSION,
        "anyOf": list(messages),
        "$defs": dict(definitions),
    }


def text(schema: dict[str, Any]) -> str:
    """As it is kept: one key a line, so that a change reads as what it is."""
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text(document()))
