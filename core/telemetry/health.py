"""`python -m core.telemetry.health` asks the process on the management port whether it is alive: 0 means yes."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

from core.settings import SETTINGS_ERRORS, TelemetrySettings, describe_faults

_TIMEOUT_SECONDS = 5.0


def main() -> int:
    try:
        settings = TelemetrySettings()
    except SETTINGS_ERRORS as error:
        return _say(describe_faults(error), status=1)
    if settings.management_port is None:
        return _say("ESPALIER_MANAGEMENT_PORT is not set, so there is nobody to ask.", status=1)
    url = f"http://127.0.0.1:{settings.management_port}/livez"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_SECONDS) as answer:
            return _say(answer.read().decode().strip(), status=0)
    except urllib.error.HTTPError as error:
        return _say(error.read().decode().strip(), status=1)
    except OSError as error:
        return _say(f"{url} does not answer: {error}", status=1)


def _say(line: str, *, status: int) -> int:
    sys.stdout.write(f"{line}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
