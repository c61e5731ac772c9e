"""Access policy: credentials, hosts and requests from pages of other sites."""

import pytest

from bpkd_sdk.serve.service.security import AccessPolicy
from tests.serve.cases import SIZE, encoded, network, scene, served, wait_until


def test_every_path_but_health_requires_credentials():
    access = AccessPolicy(token="a long secret", user="ann", password="pass:word")
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
        assert server.client.get("/healthz").status_code == 200
        wait_until(lambda: server.client.get("/readyz").status_code == 200)
        valid = [("anybody", "a long secret"), ("ann", "pass:word")]
        invalid = [("ann", "a long secre"), ("bob", "pass:word"), ("", ""), ("ann", "")]
        for logins, status in ((valid, 200), (invalid, 401)):
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
        # With credentials the Host header may name any host.
        headers = {"Host": "segment.example", "Authorization": "Bearer a long secret"}
        assert server.client.get("/v1/models", headers=headers).status_code == 200


def test_user_and_password_may_contain_any_character():
    access = AccessPolicy(user="änne", password="pässwörd: 密码")
    with served(network(), access=access) as server:
        for login, status in ((("änne", "pässwörd: 密码"), 200), (("änne", "password"), 401)):
            assert server.client.get("/v1/models", auth=login).status_code == status


def test_empty_or_incomplete_credentials_are_refused():
    for name in ("token", "user", "password"):
        with pytest.raises(ValueError, match=f"The {name} is empty, which would accept every request"):
            AccessPolicy(**{name: ""})
    with pytest.raises(ValueError, match="specify both or neither"):
        AccessPolicy(user="ann")
    assert "secret" not in repr(AccessPolicy(token="secret", user="ann", password="secret"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.com"])
def test_an_address_that_other_machines_reach_requires_credentials_or_insecure(host):
    with pytest.raises(ValueError, match=f"A server on {host} can be reached from other machines.*--token.*--insecure"):
        AccessPolicy().check_address(host)
    for access in (
        AccessPolicy(token="secret"),
        AccessPolicy(user="ann", password="secret"),
        AccessPolicy(insecure=True),
    ):
        access.check_address(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_a_loopback_address_requires_no_credentials(host):
    AccessPolicy().check_address(host)


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:99", 200), ("[::1]:99", 200), ("evil.example", 421), ("127.0.0.1.evil.example", 421)],
)  # fmt: skip
def test_only_loopback_hosts_are_answered_without_credentials(server, host, status):
    assert server.client.get("/v1/models", headers={"Host": host}).status_code == status


def test_pages_of_other_sites_can_neither_send_nor_read(server):
    content = encoded(scene(*SIZE))
    assert server.segment(content, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert server.segment(content, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    preflight = server.client.options(
        "/v1/segment", headers={"Origin": "https://evil.example", "AccessPolicy-Control-Request-Method": "POST"}
    )
    read = server.client.get("/v1/models", headers={"Origin": "https://evil.example"})
    for response in (preflight, read):
        assert not [name for name in response.headers if name.startswith("access-control-")]
