"""What the page is made of, and the address at which it is told to be."""

from __future__ import annotations

import re

import pytest

from lcm_compile.serving.server import page_address
from lcm_compile.serving.settings import ServerSettings


def test_its_files_are_guarded_and_asked_for_again(served):
    index = served.client.get("/")
    policy = index.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    assert index.headers["x-content-type-options"] == "nosniff"
    assert index.headers["cache-control"] == "no-cache"
    found = re.findall(r'(?:src|href)="(page/[^"]+)"', index.text)
    assert {"page/main.js", "page/style.css", "page/icon.svg"} <= set(found)
    for path in (*found, "docs", "page/swagger-ui-bundle.js"):
        first = served.client.get(f"/{path}")
        assert first.status_code == 200 and first.headers["content-security-policy"] == policy
        again = served.client.get(f"/{path}", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path in ("page/..%2fpage.py", "page/%2e%2e/page.py", "page/none.js", "page/"):
        assert served.client.get(f"/{path}").status_code == 404


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:80/"),
        ("0.0.0.0", "http://127.0.0.1:80/"),
        ("::", "http://[::1]:80/"),
        ("::1", "http://[::1]:80/"),
        ("box.local", "http://box.local:80/"),
    ],
)
def test_the_address_is_one_that_a_browser_opens(host, address):
    assert page_address(ServerSettings(host=host), 80) == address
    assert (
        page_address(ServerSettings(host=host, api_key="a b+&=#ü"), 80)
        == f"{address}#key=a%20b%2B%26%3D%23%C3%BC"
    )
