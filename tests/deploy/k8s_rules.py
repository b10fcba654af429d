"""Rules for every overlay that no schema contains. A rule yields one sentence for each violation."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import PurePosixPath
from typing import Any

import yaml

from core.domain.bases import Registry
from core.settings import ApiSettings, WorkerSettings
from tests.deploy.k8s_render import K8S, Object, Pod, list_pods, of_kind, template_of
from tests.unit.test_deployments import KNOWN, KNOWN_TOO

IMAGES = ("espalier-control", "espalier-worker-cpu", "espalier-worker-cuda")
GPU = "nvidia.com/gpu"
_UID = 10001
_VOLUMES = {"configMap", "csi", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_HOST = ("hostNetwork", "hostPID", "hostIPC", "hostUsers")
# The ways out that each process needs, by the ports of what it speaks to.
_EGRESS = {
    "espalier-api": {53, 5432, 6379, 443, 9000},
    "espalier-schedule": {53, 5432, 6379, 443, 9000},
    "espalier-worker": {53, 5432, 6379, 443, 9000},
    "espalier-migrate": {53, 5432},
    "espalier-bucket": {53, 443, 9000},
    "espalier-operator": {53, 5432, 6379, 443, 9000, 8000},
    "espalier-fill-weights": {53, 443},
}
_POOL = re.compile(r"'([^']+)'|/pools/(.+)/demand$")


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
    argv = [K8S / "make-secrets.sh", *arguments]
    env = {"PATH": os.environ["PATH"], **env}
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout


def urls_lead_to_services(objects: list[Object]) -> Iterator[str]:
    ports = {
        (each["metadata"]["name"], port["port"])
        for each in of_kind(objects, "Service")
        for port in each["spec"]["ports"]
    }
    for pod in list_pods(objects):
        for each in pod.containers if pod.is_ours else ():
            if url := variables_of(each, objects).get("ESPALIER_API_URL"):
                host, _, port = url.removeprefix("http://").partition(":")
                if (host, int(port or 80)) not in ports:
                    yield f"{pod} asks {url}, which is no port of a Service"


def workers_drain_in_time(objects: list[Object]) -> Iterator[str]:
    """A pod outlives what its process takes to stop, and a process is asked for it by a signal alone."""
    for pod in list_pods(objects):
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        for each in pod.containers if pod.is_ours else ():
            variables = variables_of(each, objects)
            needed = float(variables.get("ESPALIER_GRACE_SECONDS", 0)) + 5
            if pod.app == "espalier-api":
                needed = ApiSettings.model_fields["body_seconds"].default + 5
                needed += each.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            if grace < needed:
                yield f"{pod} is killed after {grace} s and may need {needed:.0f}"


def workers_leave_dead_nodes(objects: list[Object]) -> Iterator[str]:
    """A worker's pod is off a dead node before its jobs are queued again. A cluster's own default is 300 s."""
    lease_seconds = WorkerSettings.model_fields["lease_seconds"].default
    for pod in list_pods(objects):
        found = {each["key"]: each for each in pod.spec.get("tolerations", ()) if each["effect"] == "NoExecute"}
        for key in _DEAD_NODE if pod.app == "espalier-worker" else ():
            seconds = found.get(key, {}).get("tolerationSeconds", 300)
            if seconds > lease_seconds:
                yield f"{pod} stays on a node that is {key} for {seconds} s"


_DEAD_NODE = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


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


def selectors_find_pods(objects: list[Object]) -> Iterator[str]:
    pods = list_pods(objects)
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
        for each in of_kind(objects, kind):
            spec = each["spec"]
            selector = (
                {"matchLabels": spec["selector"]}
                if kind == "Service"
                else spec.get("selector", spec.get("podSelector"))
            )
            if not any(_selects(selector, pod.labels) for pod in pods):
                yield f"{kind} {each['metadata']['name']} selects no pod"
    for each in of_kind(objects, "Deployment"):
        if not _selects(each["spec"]["selector"], each["spec"]["template"]["metadata"]["labels"]):
            yield f"Deployment {each['metadata']['name']} does not select its own pods"
    names = {each["metadata"]["name"] for each in of_kind(objects, "Deployment")}
    for each in of_kind(objects, "HorizontalPodAutoscaler"):
        if each["spec"]["scaleTargetRef"]["name"] not in names:
            yield "the HorizontalPodAutoscaler scales nothing"
    if not any(pod.app == "espalier-api" and pod.spec.get("topologySpreadConstraints") for pod in pods):
        yield "the API's replicas are not spread"


def _selects(selector: Any, labels: dict[str, str]) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for each in selector.get("matchExpressions", ()):
        assert each["operator"] == "In"
        if labels.get(each["key"]) not in each["values"]:
            return False
    return True


def traffic_is_named(objects: list[Object]) -> Iterator[str]:
    """Nothing goes in or out but what is needed; what is needed does."""
    policies = [each["spec"] for each in of_kind(objects, "NetworkPolicy")]
    if not any(
        p["podSelector"] == {}
        and set(p["policyTypes"]) == {"Ingress", "Egress"}
        and not p.get("egress")
        and not p.get("ingress")
        for p in policies
    ):
        yield "not everything is denied by default"
    for pod in list_pods(objects):
        matching = [policy for policy in policies if _selects(policy["podSelector"], pod.labels)]
        out = {port["port"] for p in matching for rule in p.get("egress", ()) for port in rule["ports"]}
        into = {port["port"] for p in matching for rule in p.get("ingress", ()) for port in rule["ports"]}
        wanted = _EGRESS.get(pod.app, {53})
        if out != wanted:
            yield f"{pod} may reach the ports {sorted(out)} and needs {sorted(wanted)}"
        own = {port["name"] for each in pod.containers for port in each.get("ports", ())}
        if into != own:
            yield f"{pod} is reached on {sorted(into)} and listens on {sorted(own)}"


def pools_are_whole(objects: list[Object]) -> Iterator[str]:
    """Each worker serves one pool of the registry, no other object serves it, and it is scaled by that pool's demand."""
    registries = [
        each["data"]["registry.yaml"] for each in of_kind(objects, "ConfigMap") if "registry.yaml" in each["data"]
    ]
    bases = Registry.model_validate(yaml.safe_load(registries[0])).base_models
    offered = {f"{base.id}@{q}" for base in bases for q in ("none", *base.quantizations)}
    served = [pool for pod in list_pods(objects) if pod.app == "espalier-worker" for pool in _pools(pod)]
    if not served:
        yield "there is no worker"
    yield from (f"the pool {pool} is in no registry" for pool in served if pool not in offered)
    if len(served) != len(set(served)):
        yield f"a pool is served by several objects: {sorted(served)}"
    for each in of_kind(objects, "ScaledJob"):
        (pod,) = list_pods([each])
        yield from _scaling_faults(each, pod, _pools(pod))


def _pools(pod: Pod) -> list[str]:
    values = {each["name"]: each.get("value") for each in pod.containers[0]["env"]}
    return list(json.loads(values["ESPALIER_WORKER_POOLS"]))


def _scaling_faults(scaled_job: Object, pod: Pod, pools: list[str]) -> Iterator[str]:
    spec, job = scaled_job["spec"], scaled_job["spec"]["jobTargetRef"]
    for trigger in spec["triggers"]:
        told = trigger["metadata"]
        found = _POOL.search(told.get("query") or told.get("url") or "")
        if found is None or [found[1] or found[2]] != pools:
            yield f"{pod} serves {pools} and is scaled by {told}"
    if spec.get("scalingStrategy", {}).get("strategy") != "default":
        yield f"{pod} is not scaled by all its Jobs that have not ended"
    if spec.get("rollout", {}).get("strategy") != "gradual":
        yield f"{pod}: a change would end workers that train"
    if job.get("backoffLimit") != 0 or pod.spec.get("restartPolicy") != "Never":
        yield f"{pod}: Kubernetes itself would start workers again"
    if "activeDeadlineSeconds" in job or "activeDeadlineSeconds" in pod.spec:
        yield f"{pod}: a worker that trains for long would be killed"
    if "ESPALIER_IDLE_EXIT_SECONDS" not in {each["name"] for each in pod.containers[0]["env"]}:
        yield f"{pod}: its workers never end"


def gpus_are_asked_for_whole(objects: list[Object]) -> Iterator[str]:
    for pod in list_pods(objects):
        for each in pod.containers:
            wants = {each["resources"].get(part, {}).get(GPU) for part in ("requests", "limits")}
            has_cuda = "/espalier-worker-cuda:" in each["image"]
            if wants != ({"1"} if has_cuda else {None}):
                yield f"{pod}: {each['image']} asks for the GPUs {wants}"
            if has_cuda and not any(toleration["key"] == GPU for toleration in pod.spec.get("tolerations", ())):
                yield f"{pod} does not tolerate the taint of GPU nodes"
            if has_cuda and not pod.spec.get("nodeSelector"):
                yield f"{pod} chooses no node"


def weights_are_read_only(objects: list[Object]) -> Iterator[str]:
    for pod in list_pods(objects):
        if pod.app != "espalier-worker":
            continue
        for mount in pod.containers[0]["volumeMounts"]:
            is_kept = mount["name"] in {v["name"] for v in pod.spec["volumes"] if "persistentVolumeClaim" in v}
            if is_kept and mount.get("readOnly") is not True:
                yield f"{pod} can write to {mount['mountPath']}"


def nothing_is_left_to_fill_in(objects: list[Object]) -> Iterator[str]:
    for each in objects:
        if "POOL" in re.findall(r"\bPOOL\b", yaml.safe_dump(each)):
            yield f"{each['kind']} {each['metadata']['name']} still names the pool POOL"
        if template_of(each) is not None and not list_pods([each])[0].spec.get("containers"):
            yield f"{each['kind']} {each['metadata']['name']} has no container"


RULES: tuple[Callable[[list[Object]], Iterator[str]], ...] = (
    pods_are_restricted,
    containers_are_bounded,
    processes_are_probed,
    images_are_ours,
    names_lead_somewhere,
    the_migration_can_be_applied_first,
    urls_lead_to_services,
    workers_drain_in_time,
    workers_leave_dead_nodes,
    variables_are_settings,
    selectors_find_pods,
    traffic_is_named,
    pools_are_whole,
    gpus_are_asked_for_whole,
    weights_are_read_only,
    nothing_is_left_to_fill_in,
)


def faults(objects: list[Object]) -> list[str]:
    return [f"{rule.__name__}: {told}" for rule in RULES for told in rule(objects)]
