"""All configuration that comes from the environment, read once and validated here and nowhere else.

| variable | default | meaning |
|---|---|---|
| `ROUTER_HOST`, `PORT` | 127.0.0.1, 8000 | where to listen; any host but loopback needs `ROUTER_API_KEYS` |
| `ROUTER_API_KEYS` | none | `name:key` or `name:sha256=<hex digest>`, separated by commas |
| `ROUTER_ADMINS` | none | names of the keys that may add and remove adapters, separated by commas |
| `ROUTER_LIMITS` | none | JSON: key name, or `*` for the others, to the fields of `Limits` |
| `ROUTER_LIMITS_FAIL` | open | while Redis is away: `open` answers without limits, `closed` answers 503 |
| `ROUTER_MAX_BODY_BYTES` | 20 MiB | larger bodies get 413 |
| `ROUTER_MAX_CONCURRENCY` | 512 | requests under way; more get 429 |
| `ROUTER_MAX_CALLS_PER_EXPERT` | 256 | calls under way to one expert; more go to the next one |
| `ROUTER_REQUEST_TIMEOUT_S` | 120 | one answer with all its calls |
| `ROUTER_SHUTDOWN_GRACE_S` | 30 | how long shutdown waits for requests under way |
| `REDIS_URL` | none | `redis://`, `rediss://` or `unix://`; none: the embedded Redis is used |
| `ROUTER_REDIS_PREFIX` | router: | what every Redis key starts with |
| `ROUTER_REDIS_TIMEOUT_S` | 1 | one Redis command |
| `ROUTER_DATA_FOLDER` | data | the embedded Redis's files, and the spool of what Redis has not taken yet |
| `ROUTER_LEDGER_TEXT` | false | whether the ledger keeps queries' text, which trains routers |
| `ROUTER_LEDGER_MAX_ENTRIES` | 1000000 | the ledger's oldest entries beyond this many are dropped; 0 keeps all |
| `ROUTER_INDEX` | none | folder of `router-service index`, which `POST /v1/search` searches |
| `ROUTER_LOG_JSON` | false | log lines as JSON |
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError, model_validator

from router_service.errors import SettingsError

_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Limits(BaseModel):
    """What one API key may use. `None` is no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    tokens_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    usd_per_day: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    usd_per_month: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class Settings(BaseModel):
    """The service's configuration. Times are seconds; see the module's table for each variable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    key_digests: dict[str, str] = Field(default={}, repr=False)
    """SHA-256 (hex) of each API key, to the key's name."""
    admins: frozenset[str] = frozenset()
    limits: dict[str, Limits] = {}
    limits_fail: Literal["open", "closed"] = "open"
    max_body_bytes: int = Field(default=20 << 20, gt=0)
    max_concurrency: int = Field(default=512, gt=0)
    max_calls_per_expert: int = Field(default=256, gt=0)
    request_timeout_s: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    shutdown_grace_s: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    redis_url: SecretStr | None = None
    redis_prefix: str = Field(default="router:", min_length=1)
    redis_timeout_s: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    data_folder: Path = Path("data")
    ledger_text: bool = False
    ledger_max_entries: int = Field(default=1_000_000, ge=0)
    index: Path | None = None
    log_json: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.key_digests and not is_loopback(self.host):
            raise ValueError(f"host {self.host!r} is not loopback: set ROUTER_API_KEYS=name:key[,name:key]")
        if unknown := sorted(set(self.limits) - set(self.key_digests.values()) - {"*", ANONYMOUS}):
            raise ValueError(f"ROUTER_LIMITS names {unknown[0]!r}, which is no key of ROUTER_API_KEYS")
        if unknown := sorted(self.admins - set(self.key_digests.values())):
            raise ValueError(f"ROUTER_ADMINS names {unknown[0]!r}, which is no key of ROUTER_API_KEYS")
        return self

    def limits_of(self, key_name: str) -> Limits:
        """The limits of one key: its own, or those of `*`, or none."""
        return self.limits.get(key_name) or self.limits.get("*") or Limits()


ANONYMOUS = "anonymous"
"""The key name of callers where no API keys are configured."""

_VARIABLES = {
    "ROUTER_HOST": "host",
    "PORT": "port",
    "ROUTER_LIMITS_FAIL": "limits_fail",
    "ROUTER_MAX_BODY_BYTES": "max_body_bytes",
    "ROUTER_MAX_CONCURRENCY": "max_concurrency",
    "ROUTER_MAX_CALLS_PER_EXPERT": "max_calls_per_expert",
    "ROUTER_REQUEST_TIMEOUT_S": "request_timeout_s",
    "ROUTER_SHUTDOWN_GRACE_S": "shutdown_grace_s",
    "REDIS_URL": "redis_url",
    "ROUTER_REDIS_PREFIX": "redis_prefix",
    "ROUTER_REDIS_TIMEOUT_S": "redis_timeout_s",
    "ROUTER_DATA_FOLDER": "data_folder",
    "ROUTER_LEDGER_TEXT": "ledger_text",
    "ROUTER_LEDGER_MAX_ENTRIES": "ledger_max_entries",
    "ROUTER_INDEX": "index",
    "ROUTER_LOG_JSON": "log_json",
}


def read_settings(environment: Mapping[str, str] = os.environ, **overrides: Any) -> Settings:
    """Settings from the environment; `overrides` (what the command line gave) win. Raises `SettingsError`."""
    values: dict[str, Any] = {field: environment[name] for name, field in _VARIABLES.items() if environment.get(name)}
    if keys := environment.get("ROUTER_API_KEYS"):
        values["key_digests"] = _parse_keys(keys)
    if admins := environment.get("ROUTER_ADMINS"):
        values["admins"] = frozenset(filter(None, map(str.strip, admins.split(","))))
    if limits := environment.get("ROUTER_LIMITS"):
        values["limits"] = _parse_limits(limits)
    values.update({name: value for name, value in overrides.items() if value is not None})
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(item) for item in error.errors())) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _parse_keys(text: str) -> dict[str, str]:
    """`name:key,name:sha256=digest` to digests. Never repeats a key in an error."""
    digests: dict[str, str] = {}
    for number, pair in enumerate(filter(None, map(str.strip, text.split(","))), start=1):
        name, colon, key = pair.partition(":")
        if not colon or not key or not _KEY_NAME.fullmatch(name):
            raise SettingsError(f"ROUTER_API_KEYS: entry {number} is not name:key (names: letters, digits, . _ @ -)")
        if name in digests.values():
            raise SettingsError(f"ROUTER_API_KEYS: the name {name!r} is there twice")
        digest = _digest(name, key)
        if digest in digests:
            raise SettingsError(f"ROUTER_API_KEYS: {name!r} and {digests[digest]!r} have the same key")
        digests[digest] = name
    return digests


def _digest(name: str, key: str) -> str:
    if not key.startswith("sha256="):
        return hashlib.sha256(key.encode()).hexdigest()
    digest = key.removeprefix("sha256=").lower()
    if not _DIGEST.fullmatch(digest):
        raise SettingsError(f"ROUTER_API_KEYS: the digest of {name!r} is not 64 hexadecimal digits")
    return digest


def _parse_limits(text: str) -> dict[str, Limits]:
    try:
        return TypeAdapter(dict[str, Limits]).validate_json(text)
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(map(str, item["loc"]))
        raise SettingsError(f"ROUTER_LIMITS: {where}{': ' if where else ''}{item['msg']}") from None


def _explain(item: Any) -> str:
    """One pydantic error, by the variable's name and without the value, which may be a secret."""
    field = str(item["loc"][0]) if item["loc"] else ""
    variable = next((name for name, known in _VARIABLES.items() if known == field), field)
    return f"{variable}{': ' if variable else ''}{item['msg'].removeprefix('Value error, ')}"
