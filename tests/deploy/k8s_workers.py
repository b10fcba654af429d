"""Rules for workers: how they stop, which pool they serve, what scales them, which node they need."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import yaml

from core.domain.bases import Registry
from core.settings import ApiSettings, WorkerSettings
from tests.deploy.k8s_names import variables_of
from tests.deploy.k8s_render import Object, Pod, list_pods, of_kind

GPU = "nvidia.com/gpu"
_POOL = re.compile(r"'([^']+)'|/pools/(.+)/demand$")


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
