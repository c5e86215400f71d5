"""Configuration: what is read, and what is refused with a word on what would be right."""

from __future__ import annotations

import hashlib

import pytest

from router_service.errors import SettingsError
from router_service.settings import Limits, is_loopback, read_settings


def test_the_defaults_are_a_private_service() -> None:
    settings = read_settings({})
    assert (settings.host, settings.port, settings.key_digests) == ("127.0.0.1", 8000, {})
    assert settings.limits_of("anonymous") == Limits()


def test_the_environment_is_read_and_the_command_line_wins() -> None:
    environment = {
        "PORT": "9000",
        "ROUTER_API_KEYS": "a:secret, b:sha256=" + "0" * 64,
        "ROUTER_LIMITS": '{"a": {"usd_per_day": 1}, "*": {"requests_per_minute": 60}}',
        "ROUTER_LEDGER_TEXT": "true",
        "REDIS_URL": "",
    }
    settings = read_settings(environment, port=9001, host=None)
    assert settings.port == 9001
    assert settings.key_digests == {hashlib.sha256(b"secret").hexdigest(): "a", "0" * 64: "b"}
    assert settings.limits_of("a") == Limits(usd_per_day=1)
    assert settings.limits_of("b") == Limits(requests_per_minute=60)
    assert settings.ledger_text is True
    assert settings.redis_url is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PORT": "eighty"}, "PORT: .*integer"),
        ({"ROUTER_HOST": "0.0.0.0"}, "not loopback: set ROUTER_API_KEYS"),
        ({"ROUTER_API_KEYS": "s3cret"}, "entry 1 is not name:key"),
        ({"ROUTER_API_KEYS": "a:s3cret,a:t"}, "'a' is there twice"),
        ({"ROUTER_API_KEYS": "a:s3cret,b:s3cret"}, "'b' and 'a' have the same key"),
        ({"ROUTER_API_KEYS": "a:sha256=s3cret"}, "digest of 'a' is not 64"),
        ({"ROUTER_LIMITS": "{"}, "ROUTER_LIMITS"),
        ({"ROUTER_LIMITS": '{"*": {"usd": 1}}'}, r"ROUTER_LIMITS: \*.usd: Extra inputs"),
        ({"ROUTER_LIMITS": '{"eve": {}}'}, "'eve', which is no key"),
        ({"ROUTER_LIMITS_FAIL": "maybe"}, "ROUTER_LIMITS_FAIL: .*'open' or 'closed'"),
        ({"ROUTER_REQUEST_TIMEOUT_S": "nan"}, "ROUTER_REQUEST_TIMEOUT_S"),
    ],
)
def test_what_is_wrong_is_said_without_secrets(environment: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as error:
        read_settings(environment)
    assert "s3cret" not in str(error.value)


def test_settings_do_not_show_secrets() -> None:
    settings = read_settings({"ROUTER_API_KEYS": "a:s3cret", "REDIS_URL": "redis://:passw0rd@redis:6379"})
    assert "s3cret" not in repr(settings)
    assert "passw0rd" not in repr(settings)
    assert hashlib.sha256(b"s3cret").hexdigest() not in repr(settings)


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]", pytest.param("LOCALHOST", id="upper case")]
)
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "example.org", "::", ""])
def test_hosts_that_others_reach(host: str) -> None:
    assert not is_loopback(host)
