"""URLs of Redis as people write them, read in one place, so that redis-py and Celery are told the same.

The two read a URL by different rules, and late: at the first command, in words that quote parts of a password. Both get
their arguments from here instead. Behind `rediss://` these verify the server's certificate and its name, always.

Parameters that are read name files: the authorities that are trusted (`ssl_ca_certs`), and a certificate with its key
(`ssl_certfile`, `ssl_keyfile`) for a server that asks its clients for one, as Redis does unless it is told otherwise.
Celery never took any but those of TLS.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, unquote_plus

from core.tls import trusted_certificates

_URL = re.compile(
    r"""
    (?P<scheme>rediss?)://
    (?: (?P<login>[^/?\#]*) @ )?
    (?P<host>\[[0-9A-Fa-f:.]+\] | [A-Za-z0-9._-]+)
    (?: : (?P<port>[0-9]{1,5}) )?
    (?: / (?P<database>[0-9]{0,9}) )?
    (?: \? (?P<query>[^@\#]*) )?
    """,
    re.VERBOSE,
)
_DEFAULT_PORT = 6379
_MAX_PORT = 65_535
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
# What says only what is done anyway may be said: as redis-py, as Celery and as Python's ssl spell it.
_STRICT = {
    "ssl_cert_reqs": re.compile(r"(ssl\.)?(cert_)?required", re.IGNORECASE),
    "ssl_check_hostname": re.compile(r"true|yes|1", re.IGNORECASE),
}
_REFUSAL = (
    "This is no URL of a Redis. Write redis://user:password@host:6379/0, or rediss:// where it speaks TLS, and what a "
    "password has of /, ?, #, @, : and % percent-encoded."
)
_PARAMETERS_REFUSAL = (
    "A rediss:// URL takes the parameters ssl_ca_certs, ssl_certfile and ssl_keyfile, each once and with the path of a "
    "file, and a redis:// URL takes none. Leave every other one out."
)
_WEAKER_REFUSAL = (
    "The certificate and the name of a Redis are verified always. Leave ssl_cert_reqs and ssl_check_hostname out of "
    "the URL, and name a private authority by ssl_ca_certs=/path/of/ca.pem."
)


@dataclass(frozen=True)
class RedisAddress:
    """`url` is the server, the login and the database, without parameters. `tls` are those of TLS, None without it.

    Both of redis-py and of Celery (`broker_use_ssl`) understand the two.
    """

    url: str = field(repr=False)
    tls: Mapping[str, Any] | None

    @property
    def arguments(self) -> dict[str, Any]:
        """What `redis.Redis.from_url` is called with, besides timeouts."""
        return {"url": self.url, **(self.tls or {})}


def read_redis_url(url: str) -> RedisAddress:
    """Raises ValueError, which quotes nothing of the URL, since it holds a password."""
    parts = _URL.fullmatch(url.strip())  # a secret that was made by `echo` ends in a new line
    if parts is None:
        raise ValueError(_REFUSAL)
    place = f"{_read_login(parts['login'] or '')}{_read_host(parts['host'])}:{_read_port(parts['port'])}"
    parameters = _read_parameters(parts["query"] or "")
    is_tls = parts["scheme"] == "rediss"
    if parameters and not is_tls:
        raise ValueError(_PARAMETERS_REFUSAL)
    return RedisAddress(
        url=f"{parts['scheme']}://{place}/{int(parts['database'] or 0)}",
        tls=_verify_always(parameters) if is_tls else None,
    )


def check_files(address: RedisAddress) -> None:
    """Raises ValueError where a file that the URL names is not there, or holds something else."""
    named = address.tls or {}
    if not named.keys() & set(_FILES):
        return
    try:
        context = trusted_certificates(named.get("ssl_ca_certs"))
    except OSError:
        raise ValueError("ssl_ca_certs names no file of certificates that can be read.") from None
    if "ssl_certfile" not in named:
        return
    try:
        # Without a password OpenSSL asks a terminal for that of a key.
        context.load_cert_chain(named["ssl_certfile"], named.get("ssl_keyfile"), password="")
    except OSError:
        raise ValueError("ssl_certfile and ssl_keyfile name no certificate with its key that can be read.") from None


def _read_login(login: str) -> str:
    """Return a login with its @, percent-encoded throughout; nothing where nobody logs in."""
    try:
        user, _, password = (unquote(part, errors="strict") for part in login.partition(":"))
        return f"{quote(user, safe='')}:{quote(password, safe='')}@" if user or password else ""
    except UnicodeError:  # its words quote what it could not read
        raise ValueError(_REFUSAL) from None


def _read_host(host: str) -> str:
    if host.startswith("["):
        try:
            ipaddress.IPv6Address(host.strip("[]"))
        except ValueError:
            raise ValueError(_REFUSAL) from None
    return host


def _read_port(port: str | None) -> int:
    number = _DEFAULT_PORT if port is None else int(port)
    if not 1 <= number <= _MAX_PORT:
        raise ValueError(f"The port in a URL of a Redis is a number from 1 to {_MAX_PORT}.")
    return number


def _read_parameters(query: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        if name in parameters:  # redis-py takes the first, Celery the last
            raise ValueError(_PARAMETERS_REFUSAL)
        parameters[name] = unquote_plus(value)
    return parameters


def _verify_always(parameters: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of TLS. Raises ValueError for what would verify less, or is not known."""
    files = {name: value for name, value in parameters.items() if name in _FILES}
    strictness = {name: value for name, value in parameters.items() if name in _STRICT}
    if not all(_STRICT[name].fullmatch(value) for name, value in strictness.items()):
        raise ValueError(_WEAKER_REFUSAL)
    is_keyless = "ssl_keyfile" in files and "ssl_certfile" not in files
    if len(files) + len(strictness) < len(parameters) or not all(files.values()) or is_keyless:
        raise ValueError(_PARAMETERS_REFUSAL)
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True, **files}
