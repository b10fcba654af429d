"""URLs of Redis as people write them, read in one place, so that redis-py and Celery get the same arguments.

The two libraries read a URL by different rules and only at the first command, and their errors quote parts of the
password. So both get their arguments from here instead. With `rediss://` the server's certificate and name are always
verified.

The parameters that are read name files: the trusted authorities (`ssl_ca_certs`), and a certificate with its key
(`ssl_certfile`, `ssl_keyfile`) for a server that requires one of its clients, as Redis does by default. Celery never
accepted other parameters than those of TLS.
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
# Parameters that ask for what is done anyway are accepted, in the spellings of redis-py, Celery and Python's ssl.
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
    """`url` has the server, the login and the database, but no parameters. `tls` has those of TLS, if it is used.

    Both redis-py and Celery (`broker_use_ssl`) understand the keys of `tls`.
    """

    url: str = field(repr=False)
    tls: Mapping[str, Any] | None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `redis.Redis.from_url`, except timeouts."""
        return {"url": self.url, **(self.tls or {})}


def read_redis_url(url: str) -> RedisAddress:
    """Raises ValueError, which quotes nothing of the URL, because the URL contains a password."""
    parts = _URL.fullmatch(url.strip())  # a secret written with `echo` ends in a newline
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
    """Raises ValueError if a file that the URL names is missing or has other content."""
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
        # Given no password for a key, OpenSSL would ask for one on the terminal.
        context.load_cert_chain(named["ssl_certfile"], named.get("ssl_keyfile"), password="")
    except OSError:
        raise ValueError("ssl_certfile and ssl_keyfile name no certificate with its key that can be read.") from None


def _read_login(login: str) -> str:
    """Return a login with its @, percent-encoded throughout, or an empty string without a login."""
    try:
        user, _, password = (unquote(part, errors="strict") for part in login.partition(":"))
        return f"{quote(user, safe='')}:{quote(password, safe='')}@" if user or password else ""
    except UnicodeError:  # its message quotes the value that it could not read
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
    """Return the arguments of TLS. Raises ValueError for a parameter that is unknown or would verify less."""
    files = {name: value for name, value in parameters.items() if name in _FILES}
    strictness = {name: value for name, value in parameters.items() if name in _STRICT}
    if not all(_STRICT[name].fullmatch(value) for name, value in strictness.items()):
        raise ValueError(_WEAKER_REFUSAL)
    is_keyless = "ssl_keyfile" in files and "ssl_certfile" not in files
    if len(files) + len(strictness) < len(parameters) or not all(files.values()) or is_keyless:
        raise ValueError(_PARAMETERS_REFUSAL)
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True, **files}
