"""HTTP: the REST API, its OpenAPI document, and who may call it."""
