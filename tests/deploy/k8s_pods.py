"""Rules for each pod by itself: its rights, resources, probes and images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from tests.deploy.k8s_render import Object, Pod, list_pods

IMAGES = ("espalier-control", "espalier-worker-cpu", "espalier-worker-cuda")
_UID = 10001
_VOLUMES = {"configMap", "csi", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_HOST = ("hostNetwork", "hostPID", "hostIPC", "hostUsers")


def pods_are_restricted(objects: list[Object]) -> Iterator[str]:
    """Pod Security's level "restricted", a read-only root on top, and no way to the cluster's API."""
    for pod in list_pods(objects):
        context = pod.spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{pod} may run as root"
        if pod.is_ours and {context.get("runAsUser"), context.get("fsGroup")} != {_UID}:
            yield f"{pod} does not run as {_UID}"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod} has no seccomp profile"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod} gets a token of the cluster's API"
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod} gets variables of every Service"
        yield from (f"{pod} sets {name}" for name in _HOST if pod.spec.get(name))
        for volume in pod.spec.get("volumes", ()):
            if not set(volume) - {"name"} <= _VOLUMES:
                yield f"{pod}: the volume {volume['name']} is of a kind that is not restricted"
        for each in pod.containers:
            yield from _loose_ends(pod, each)


def _loose_ends(pod: Pod, container: Object) -> Iterator[str]:
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield f"{pod}: {container['name']} may gain privileges"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{pod}: {container['name']} keeps capabilities"
    if context.get("readOnlyRootFilesystem") is not True:
        yield f"{pod}: {container['name']} can write to its root"
    if any("hostPort" in port for port in container.get("ports", ())):
        yield f"{pod}: {container['name']} takes a port of its node"


def containers_are_bounded(objects: list[Object]) -> Iterator[str]:
    for pod in list_pods(objects):
        for each in pod.containers:
            resources = each.get("resources", {})
            if not {"cpu", "memory"} <= resources.get("requests", {}).keys():
                yield f"{pod}: {each['name']} asks for no CPU or memory"
            if "memory" not in resources.get("limits", {}):
                yield f"{pod}: {each['name']} has no memory limit"
        for volume in pod.spec.get("volumes", ()):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{pod}: the volume {volume['name']} has no sizeLimit"


def processes_are_probed(objects: list[Object]) -> Iterator[str]:
    for pod in list_pods(objects):
        for each in pod.containers if pod.is_long_running else ():
            wanted = {"livenessProbe", "readinessProbe"} | ({"startupProbe"} if pod.is_ours else set())
            yield from (f"{pod}: {each['name']} has no {name}" for name in sorted(wanted - each.keys()))
            ports = {port["name"] for port in each.get("ports", ())}
            for name in wanted & each.keys():
                target = each[name].get("httpGet") or each[name]["tcpSocket"]
                if target["port"] not in ports:
                    yield f"{pod}: {name} asks the port {target['port']}, which {each['name']} does not name"
                if pod.is_ours and (target["port"], target["path"]) not in _PROBED:
                    yield f"{pod}: {name} asks {target['path']} of {target['port']}"


_PROBED = {("management", "/livez"), ("management", "/readyz"), ("http", "/readyz")}


def images_are_ours(objects: list[Object]) -> Iterator[str]:
    """The names that the build gives them, one registry, one version. Only servers to try with are other people's."""
    ours = set()
    for pod in list_pods(objects):
        for each in pod.containers:
            path, _, tag = each["image"].rpartition(":")
            name = PurePosixPath(path).name
            if name in IMAGES:
                ours.add((path.removesuffix(name), tag))
            elif not pod.name.startswith("espalier-dev-"):
                yield f"{pod} runs the image {each['image']}"
            if not tag or tag == "latest" or "/" in tag:
                yield f"{pod}: {each['image']} names no version"
    if len(ours) > 1:
        yield f"the images are of several registries or versions: {sorted(ours)}"
