"""Who may come in."""

import pytest

from bpkd_sdk.serve.service.security import Access
from tests.serve.cases import SIZE, encoded, network, scene, served


def test_a_token_opens_everything_and_nothing_opens_without():
    access = Access(token="a long secret", user="ann", password="pass:word")
    with served(network(), access=access) as server:
        for path in (
            "/v1/models",
            "/metrics",
            "/docs",
            "/openapi.json",
            "/nothing",
            "/static-offline-docs/favicon.png",
        ):
            refused = server.client.get(path)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith("Basic ")
        assert server.segment(encoded(scene(*SIZE))).status_code == 401
        assert [server.client.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
        right = [("anybody", "a long secret"), ("ann", "pass:word")]
        wrong = [("ann", "a long secre"), ("bob", "pass:word"), ("", ""), ("ann", "")]
        for logins, status in ((right, 200), (wrong, 401)):
            assert {server.client.get("/v1/models", auth=login).status_code for login in logins} == {status}
        for value in ("Bearer a long secret", "bearer a long secret"):
            assert server.client.get("/v1/models", headers={"Authorization": value}).status_code == 200
        for value in (
            "Bearer a long secret2",
            "Bearer",
            "Basic !",
            "Basic /w==",
            "a long secret",
            "Digest x",
            "Bearer ä",
        ):
            refused = server.client.get("/v1/models", headers={"Authorization": value.encode()})
            assert refused.status_code == 401
        # With a token the server may have any name.
        named = {"Host": "segment.example", "Authorization": "Bearer a long secret"}
        assert server.client.get("/v1/models", headers=named).status_code == 200


def test_secrets_that_are_none():
    for name in ("token", "user", "password"):
        with pytest.raises(ValueError, match=f"The {name} is empty, which would let anybody in"):
            Access(**{name: ""})
    with pytest.raises(ValueError, match="give both or none"):
        Access(user="ann")
    assert "secret" not in repr(Access(token="secret", user="ann", password="secret"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.com"])
def test_an_address_that_others_reach_needs_a_secret_or_a_word(host):
    with pytest.raises(ValueError, match=f"On {host} others could reach this server.*--token.*--insecure"):
        Access().check_address(host)
    for access in (Access(token="secret"), Access(user="ann", password="secret"), Access(insecure=True)):
        access.check_address(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_this_machine_needs_none(host):
    Access().check_address(host)


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:99", 200), ("[::1]:99", 200), ("evil.example", 421), ("127.0.0.1.evil.example", 421)],
)  # fmt: skip
def test_a_page_cannot_reach_the_server_under_a_name_of_its_own(server, host, status):
    assert server.client.get("/v1/models", headers={"Host": host}).status_code == status


def test_pages_of_other_sites(server):
    """They may neither send nor read."""
    content = encoded(scene(*SIZE))
    assert server.segment(content, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert server.segment(content, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    asked = server.client.options(
        "/v1/segment", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    )
    read = server.client.get("/v1/models", headers={"Origin": "https://evil.example"})
    for answer in (asked, read):
        assert not [name for name in answer.headers if name.startswith("access-control-")]
