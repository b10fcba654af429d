"""Rules for what a pod names: ConfigMaps, accounts, claims, keys of Secrets, and settings."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

import yaml

from tests.deploy.k8s_render import K8S, Object, Pod, list_pods, of_kind
from tests.known_settings import KNOWN, KNOWN_TOO


def names_lead_somewhere(objects: list[Object]) -> Iterator[str]:
    """Every ConfigMap, account, claim and key of a Secret that a pod names is there; no Secret is in an overlay."""
    there = {(each["kind"], each["metadata"]["name"]) for each in objects}
    yield from (f"the Secret {name} is in the overlay" for kind, name in there if kind == "Secret")
    keys = secret_keys()
    for pod in list_pods(objects):
        for kind, name in _references(pod):
            if (kind, name) not in there:
                yield f"{pod} names the {kind} {name}, which is not there"
        for secret, key in _wanted_keys(pod):
            if key not in keys.get(secret, ()):
                yield f"{pod} wants {key or 'all'} of the Secret {secret}, which make-secrets.sh does not make"
    for each in of_kind(objects, "TriggerAuthentication"):
        for target in each["spec"]["secretTargetRef"]:
            if target["key"] not in keys.get(target["name"], ()):
                yield f"KEDA wants {target['key']} of the Secret {target['name']}, which make-secrets.sh does not make"


def the_migration_can_be_applied_first(objects: list[Object]) -> Iterator[str]:
    """`kubectl apply -l espalier/step=migrate` takes the Job, all that its pod names, and no other pod."""
    labelled = {
        (each["kind"], each["metadata"]["name"])
        for each in objects
        if each["metadata"].get("labels", {}).get("espalier/step") == "migrate"
    }
    for pod in list_pods(objects):
        is_first = (pod.kind, pod.name) in labelled
        if is_first != (pod.app == "espalier-migrate"):
            yield f"{pod} {'is' if is_first else 'is not'} applied with the migration"
        for kind, name in _references(pod) if pod.app == "espalier-migrate" else ():
            if (kind, name) not in labelled:
                yield f"the {kind} {name} is not applied with the migration, which needs it"


def _references(pod: Pod) -> Iterator[tuple[str, str]]:
    if "serviceAccountName" in pod.spec:
        yield "ServiceAccount", pod.spec["serviceAccountName"]
    for volume in pod.spec.get("volumes", ()):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in pod.containers:
        for source in container.get("envFrom", ()):
            yield "ConfigMap", source["configMapRef"]["name"]


def _wanted_keys(pod: Pod) -> Iterator[tuple[str, str]]:
    """Yield the Secret and the key of every variable that is taken from one, directly or by a file."""
    files = mounted_files(pod)
    for container in pod.containers:
        mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", ())}
        for variable in container.get("env", ()):
            if source := variable.get("valueFrom", {}).get("secretKeyRef"):
                yield source["name"], source["key"]
            if variable["name"].endswith("_FILE"):
                path = PurePosixPath(variable["value"])
                found = files.get(mounts.get(str(path.parent), ""), {})
                yield found.get(path.name, (f"at {path.parent}", path.name))


def mounted_files(pod: Pod) -> dict[str, dict[str, tuple[str, str]]]:
    """Return the files of each volume of a pod that come of Secrets: the Secret and the key of each."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for volume in pod.spec.get("volumes", ()):
        files = found.setdefault(volume["name"], {})
        if "secret" in volume:
            files |= _files_of(volume["secret"]["secretName"], volume["secret"])
        for source in volume.get("projected", {}).get("sources", ()):
            files |= _files_of(source["secret"]["name"], source["secret"])
    return found


def _files_of(secret: str, source: Object) -> dict[str, tuple[str, str]]:
    items = source.get("items") or [{"key": key, "path": key} for key in secret_keys().get(secret, ())]
    return {item["path"]: (secret, item["key"]) for item in items}


@cache
def secret_keys() -> dict[str, set[str]]:
    """Return the keys of each Secret that make-secrets.sh makes."""
    printed = print_secrets("--dev") + print_secrets("--operator-key", OPERATOR_KEY="esp_oper_x")
    return {each["metadata"]["name"]: set(each["stringData"]) for each in yaml.safe_load_all(printed) if each}


def print_secrets(*arguments: str, **env: str) -> str:
    """Return what make-secrets.sh prints. Raises CalledProcessError where it refuses."""
    argv: list[str | Path] = [K8S / "make-secrets.sh", *arguments]
    env = {"PATH": os.environ["PATH"], **env}
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout


def variables_of(container: Object, objects: list[Object]) -> dict[str, str]:
    """Return a container's variables as far as they are no secrets. Its own win over those of ConfigMaps."""
    maps = {each["metadata"]["name"]: each.get("data", {}) for each in of_kind(objects, "ConfigMap")}
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found |= maps.get(source["configMapRef"]["name"], {})
    return found | {each["name"]: each["value"] for each in container.get("env", ()) if "value" in each}


def variables_are_settings(objects: list[Object]) -> Iterator[str]:
    for pod in list_pods(objects):
        for each in pod.containers if pod.is_ours else ():
            told = {name for name in variables_of(each, objects) if name.startswith("ESPALIER_")}
            told |= {variable["name"] for variable in each.get("env", ()) if variable["name"].startswith("ESPALIER_")}
            yield from (f"{pod}: {name} is no setting" for name in sorted(told - KNOWN - KNOWN_TOO))
