"""Which certificate authorities this process trusts."""

from __future__ import annotations

import ssl


def trusted_certificates(ca_bundle: str | None) -> ssl.SSLContext:
    """Return a context that trusts the authorities in a file, or else the system's. Raises OSError."""
    return ssl.create_default_context(cafile=ca_bundle)
