"""Requests made up from the server's own description of itself: whatever comes, no answer is a 5xx."""

from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

import moedge

ENDPOINTS = {
    *("/v1/models", "/v1/models/{name}", "/v1/completions", "/v1/chat/completions", "/v1/embeddings"),
    *("/tokenize", "/health", "/metrics", "/cache"),
}


def test_no_answer_is_the_servers_fault(serve: Any, model: Any) -> None:
    running = serve(lambda: moedge.load(model, context=48, parallel=2), parallel=2)
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    tried = set()
    for operation in (found.ok() for found in schema.get_all_operations()):

        @settings(
            max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            case.call_and_validate(checks=[not_a_server_error])

        check()
        tried.add(operation.path)
    assert tried == ENDPOINTS
