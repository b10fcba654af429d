"""`make check-k8s`: all checks of k8s/ that need no cluster.

kubectl renders every overlay. Its objects are compared with the schemas of Kubernetes (several versions), KEDA and
Karpenter, checked by our own rules (k8s_rules) and scanned by checkov. Then overlays are broken on purpose, and each
check must complain. No API server is asked; docs/install-kubernetes.md lists what only an API server can tell.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.deploy import k8s_bites
from tests.deploy.k8s_bites import BITTEN, Bite
from tests.deploy.k8s_render import OVERLAYS, Object, as_plain_job, find_kubectl, of_kind, render
from tests.deploy.k8s_rules import faults
from tests.environments import DIRECTORY as PROGRAMS
from tests.environments import find_program

HERE = Path(__file__).parent
VERSIONS = ("1.30", "1.33", "1.37")  # from the oldest that knows what is used (a preStop that sleeps) to the newest
_VALIDATE = "kubernetes-validate==1.37.0"
_CHECKOV = "checkov==3.3.30"
_KARPENTER = "@kubernetes-models/karpenter@2.0.0"
# What checkov asks for and is not wanted here, each with the reason.
_NOT_WANTED = {
    "CKV_K8S_11": "no CPU limits: they throttle a process while its node has CPU to spare; requests share it out",
    "CKV_K8S_15": "tags are never moved, so an image that is there need not be asked for again",
    "CKV_K8S_35": "a worker gets secrets as variables: its trainer, of the same user, can never read those",
    "CKV_K8S_40": "PostgreSQL and Valkey of the overlay dev run as the users of their images",
    "CKV_K8S_43": "the registry and so the digest are the installation's: k8s/components/images takes one",
}


def main() -> int:
    rendered = {overlay: render(overlay) for overlay in OVERLAYS}
    for overlay, objects in rendered.items():
        kinds = Counter(each["kind"] for each in objects)
        print(f"{overlay}: {len(objects)} objects: {', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))}")
    complaints = [f"{overlay}: {told}" for overlay, objects in rendered.items() for told in faults(objects)]
    different = unlike([each for objects in rendered.values() for each in objects], [])
    complaints += [*schema_errors(different), *node_pool_errors(different), *scan(rendered)]
    missed = [f"a check does not bite: {told}" for told in find_missed(rendered[BITTEN])]
    for told in (*complaints, *missed):
        print(told)
    print(f"check-k8s: {'all of it held.' if not complaints + missed else 'not all of it held.'}")
    return bool(complaints + missed)


def unlike(objects: list[Object], known: list[Object]) -> list[Object]:
    """Return each object once, without those that are known."""
    texts = {json.dumps(each, sort_keys=True): each for each in objects}
    return [each for text, each in texts.items() if text not in {json.dumps(one, sort_keys=True) for one in known}]


def schema_errors(objects: list[Object]) -> list[str]:
    python = find_program(_VALIDATE, "python")
    return _lines([python, HERE / "k8s_schemas.py", json.dumps(VERSIONS)], objects)


def node_pool_errors(objects: list[Object]) -> list[str]:
    """Ask Karpenter's schema, which needs Node 20 or newer."""
    pools = of_kind(objects, "NodePool")
    if not pools:
        return []
    if not shutil.which("npm"):
        return ["there is no npm: the NodePool could not be checked"]
    place = PROGRAMS / "karpenter"
    if not (place / "node_modules").exists():
        place.mkdir(parents=True, exist_ok=True)
        npm: list[str | Path] = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", place, _KARPENTER]
        subprocess.run(npm, check=True)
    shutil.copy2(HERE / "schemas/node_pool.mjs", place)
    return _lines(["node", place / "node_pool.mjs"], pools)


def _lines(argv: list[str | Path], objects: list[Object]) -> list[str]:
    done = subprocess.run(argv, input=json.dumps(objects), capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-2000:])
        done.check_returncode()
    return done.stdout.splitlines()


def scan(rendered: dict[str, list[Object]]) -> list[str]:
    """Return what checkov finds. A ScaledJob is shown to it as the Job that it makes."""
    with tempfile.TemporaryDirectory() as place:
        for overlay, objects in rendered.items():
            shown = [as_plain_job(each) if each["kind"] == "ScaledJob" else each for each in objects]
            (Path(place) / f"{Path(overlay).name}.yaml").write_text(yaml.safe_dump_all(shown), encoding="utf-8")
        argv: list[str | Path] = [
            find_program(_CHECKOV, "checkov"),
            "--framework",
            "kubernetes",
            "--skip-download",
            "--output",
            "json",
        ]
        argv += ["--skip-check", ",".join(_NOT_WANTED), "--directory", place]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)
    assert told["summary"]["passed"] > len(rendered), "checkov has looked at nothing"
    return [
        f"{each['file_path']}: {each['resource']}: {each['check_id']} {each['check_name']}"
        for each in told["results"]["failed_checks"]
    ]


def find_missed(objects: list[Object]) -> list[str]:
    """Return what was broken without a complaint, and print how much was."""
    checks: tuple[tuple[str, tuple[Bite, ...], Callable[[list[Object]], list[str]]], ...] = (
        ("our own rules", k8s_bites.RULES, faults),
        ("schemas", k8s_bites.SCHEMAS, lambda broken: schema_errors(unlike(broken, objects))),
        ("Karpenter's schema", k8s_bites.NODE_POOLS, node_pool_errors),
        ("checkov", k8s_bites.SCANNED, lambda broken: scan({BITTEN: broken})),
    )
    missed = []
    for name, bites, complain in checks:
        lost = [bite.told for bite in bites if not any(bite.told in told for told in complain(bite.broken(objects)))]
        print(f"{name}: {len(bites) - len(lost)} of {len(bites)} breaks were noticed")
        missed += lost
    return missed


if __name__ == "__main__":
    began = time.monotonic()
    print(
        f"kubectl: {find_kubectl()}; schemas of Kubernetes {', '.join(VERSIONS)}; checkov without {', '.join(_NOT_WANTED)}"
    )
    code = main()
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(code)
