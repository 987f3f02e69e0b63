"""Requests that are made from the server's own OpenAPI, right ones and wrong ones, never make it fail."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, given, settings

FEW = settings(max_examples=8, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True)


def test_no_request_makes_the_server_fail(served):
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [one.ok() for one in schema.get_all_operations()]
    assert "/v1/images/generations" in [operation.path for operation in operations]
    for operation in operations:

        @FEW
        @given(case=operation.as_strategy())
        def check(case):
            answer = case.call(timeout=120)
            assert answer.status_code < 500, case.as_curl_command()

        check()
