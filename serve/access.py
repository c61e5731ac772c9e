"""Who may use the server: everybody on this machine, or whoever has a token or a password."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Access:
    """What a request has to show. All of the server asks for it: service, documentation and demo.

    A token is taken as ``Authorization: Bearer <token>``, or as the password that a browser asks for, with any user
    name. Without token and user, only requests that name this machine as their host are answered, so that a page in a
    browser cannot reach the server under a name of its own (DNS rebinding).

    Attributes:
        token: A long secret.
        user: A name, together with a password.
        password: Of the user.
        insecure: Let anybody in, under any host name.

    Raises:
        ValueError: For an empty secret, a user without password, or a password without user.
    """

    token: str | None = field(default=None, repr=False)
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    insecure: bool = False

    def __post_init__(self) -> None:
        for name in ("token", "user", "password"):
            if getattr(self, name) == "":
                raise ValueError(f"The {name} is empty, which would let anybody in. Is its variable set?")
        if (self.user is None) != (self.password is None):
            raise ValueError("A user needs a password and a password a user: give both or none.")

    @property
    def is_restricted(self) -> bool:
        """Whether a token or a password is asked for."""
        return self.token is not None or self.user is not None

    def admits(self, authorization: str) -> bool:
        """Whether the value of an Authorization header is good enough; in a time that does not depend on what fits."""
        if not self.is_restricted:
            return True
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "bearer":
            return _same(value.strip(), self.token)
        if scheme.lower() != "basic":
            return False
        try:
            user, _, password = base64.b64decode(value.strip(), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        return _same(password, self.token) | (_same(user, self.user) & _same(password, self.password))

    def knows_host(self, host: str) -> bool:
        """Whether a Host header is one that requests may name."""
        return self.is_restricted or self.insecure or is_loopback(_without_port(host))

    def check_address(self, host: str) -> None:
        """Raise ValueError if a server on this address would be open to others without anybody having said so."""
        if self.is_restricted or self.insecure or is_loopback(host):
            return
        raise ValueError(
            f"On {host} others could reach this server, and nothing keeps them out. Give --token (a long secret, best "
            "in the variable BPKD_TOKEN) or --user and --password, stay on 127.0.0.1, or say --insecure."
        )


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _same(given: str, expected: str | None) -> bool:
    return expected is not None and hmac.compare_digest(given.encode(), expected.encode())
