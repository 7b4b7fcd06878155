"""Who asks: the caller that the gate found, and what it may see and do.  Pure: no jax here."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from jaxlora.core.errors import Forbidden

LOCAL_TENANT = "local"  # who asks where no keys are configured


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who sent a request."""

    owner: str  # the tenant that what the request makes belongs to
    admin: bool  # sees and changes every tenant's objects, and may name folders of the server
    key_id: str | None = None  # None where no keys are configured

    @property
    def sees(self) -> str | None:
        """The tenant whose objects the caller may see; None: every tenant's."""
        return None if self.admin else self.owner

    def need_admin(self, what: str) -> None:
        """Raises Forbidden for a tenant's key.  what: of the message, such as "loading from a server folder"."""
        if not self.admin:
            raise Forbidden(f"{what} needs a key of the role admin")


LOCAL = Caller(owner=LOCAL_TENANT, admin=True)


def anyone(connection: HTTPConnection) -> Caller:
    """The caller of any request where no keys are configured."""
    return LOCAL


def caller_of(request: HTTPConnection) -> Caller:
    """Who asks, as the gate found before it read the body."""
    return request.state.caller


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
