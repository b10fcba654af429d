"""`python -m tests.deploy.alerts`: is each alert well formed and documented, and does it fire when it should?

The checks with promtool need Debian's package `prometheus`. The other checks run without it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.packages import NotInstalledError, ensure_programs

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
COMMANDS = (
    ("check", "config", PROMETHEUS / "prometheus.yml"),
    ("check", "rules", "--lint-fatal", PROMETHEUS / "alerts.yml"),
    ("test", "rules", PROMETHEUS / "alerts_test.yml"),
)


def read_alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def find_faults() -> list[str]:
    """Return what is wrong with the alerts, as far as their files say."""
    alerts = read_alerts()
    cases = [
        case
        for test in yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    fired = {case["alertname"] for case in cases if case["exp_alerts"]}
    quiet = {case["alertname"] for case in cases if not case["exp_alerts"]}
    faults = [f"{name}: no test sees it fire" for name in alerts if name not in fired]
    faults += [f"{name}: no test sees it quiet" for name in alerts if name not in quiet]
    for name, rule in alerts.items():
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), flags=re.MULTILINE)
        if anchor not in {heading.strip().lower().replace(" ", "-") for heading in headings}:
            faults.append(f"{name}: {page} has no section {anchor!r}")
    return faults


def without_discovery(path: Path, place: Path) -> Path:
    """Return a copy of a configuration that promtool can check: Debian builds it without Kubernetes."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    for scrape in config["scrape_configs"]:
        del scrape["kubernetes_sd_configs"]
        scrape["static_configs"] = [{"targets": ["127.0.0.1:9464"]}]
    copy = place / path.name
    copy.write_text(yaml.safe_dump(config), encoding="utf-8")
    return copy


def run_promtool() -> list[str]:
    with tempfile.TemporaryDirectory() as place:
        pods = without_discovery(PROMETHEUS / "kubernetes.yml", Path(place))
        return [told for command in (*COMMANDS, ("check", "config", pods)) for told in complaints_of(command)]


def complaints_of(command: tuple[str | Path, ...]) -> list[str]:
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
    return [f"promtool {' '.join(map(str, command))}:\n{done.stdout}{done.stderr}"] if done.returncode else []


def main() -> int:
    faults = find_faults()
    try:
        ensure_programs(("promtool",), packages=("prometheus",))
        faults += run_promtool()
    except NotInstalledError as error:
        print(f"The rules were read, and not run: {error}.")
    print("\n".join(faults) or f"{len(read_alerts())} alerts are sound.")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
