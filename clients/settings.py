"""Settings of the client's commands: one tree, with units and defaults."""

from __future__ import annotations

from pydantic import BaseModel, Field, SecretStr

from clients.connection import DEFAULT_TIMEOUT, DEFAULT_URL


class ClientSettings(BaseModel, frozen=True, extra="forbid"):
    """What ``abmll ask``, ``score``, ``tasks`` and ``teach`` can be told of the server."""

    url: str = Field(
        default=DEFAULT_URL, description="the server's address", json_schema_extra={"variable": "ABMLL_URL"}
    )
    timeout: float = Field(default=DEFAULT_TIMEOUT, gt=0, description="longest wait for a reply, in seconds")
    key: SecretStr | None = Field(
        default=None,
        description="API key, where the server asks for one; default: none",
        json_schema_extra={"variable": "ABMLL_KEY"},
    )
