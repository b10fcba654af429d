"""Endpoints and buckets of S3, checked at start. What the client would refuse or misread is refused here."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

_ENDPOINT = re.compile(
    r"""
    (?: (?P<scheme>https?)://)?
    (?P<host>\[[0-9A-Fa-f:.]+\] | [A-Za-z0-9._-]+)
    (?: : (?P<port>[0-9]{1,5}) )?
    (?P<behind>[/?\#].*)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_MAX_PORT = 65_535
# The spelling before 2019. The client takes such a region for part of the bucket's name, and signs for us-east-1.
_DASHED = re.compile(r"s3-([a-z]{2}(?:-[a-z]+)+-[0-9])\.amazonaws\.com", re.IGNORECASE)
_WITH_BUCKET = re.compile(r"(?!.*\.vpce-).+\.s3[.-](.*\.)?amazonaws\.com(\.cn)?", re.IGNORECASE)
_REFUSAL = "Write host:port, http://host:port or https://host."
_BEHIND_REFUSAL = "It names a server and nothing behind it: the bucket is a setting of its own."
_LABEL = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
_BUCKET = re.compile(rf"(?=.{{3,63}}$){_LABEL}(?:\.{_LABEL})*")


@dataclass(frozen=True)
class Endpoint:
    """`host` includes the port, if one was written."""

    host: str
    secure: bool | None  # None without a scheme; a setting decides then


def read_endpoint(value: str) -> Endpoint:
    """Read `host`, `host:port`, `http://host:port` or `https://host`. Raises ValueError, which quotes no login."""
    parts = _ENDPOINT.fullmatch(value.strip())
    if parts is None or not _is_address(parts["host"]):
        raise ValueError(_REFUSAL)
    if (parts["behind"] or "").strip("/") or _WITH_BUCKET.fullmatch(parts["host"]):
        raise ValueError(_BEHIND_REFUSAL)
    if parts["port"] is not None and not 1 <= int(parts["port"]) <= _MAX_PORT:
        raise ValueError(f"The port is a number from 1 to {_MAX_PORT}.")
    if dashed := _DASHED.fullmatch(parts["host"]):
        raise ValueError(f"AWS calls this host s3.{dashed[1]}.amazonaws.com now: write that.")
    place = parts["host"] if parts["port"] is None else f"{parts['host']}:{parts['port']}"
    return Endpoint(place, parts["scheme"].lower() == "https" if parts["scheme"] else None)


def check_bucket_name(name: str) -> str:
    """Raises ValueError for a name that S3 does not accept."""
    if not _BUCKET.fullmatch(name) or re.fullmatch(r"[0-9.]+", name):
        raise ValueError(
            "A bucket's name has 3 to 63 lower-case letters, digits, dots and hyphens. It begins and ends with a "
            "letter or a digit, and so does what is between dots. It is no address."
        )
    return name


def _is_address(host: str) -> bool:
    """Return whether text in brackets is an IP address. A host without brackets is a name, or is refused elsewhere."""
    if not host.startswith("["):
        return True
    try:
        ipaddress.IPv6Address(host.strip("[]"))
    except ValueError:
        return False
    return True
