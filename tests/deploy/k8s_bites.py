"""Tests the checks: an overlay is broken in one place, and the check for this place must report it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.deploy.k8s_render import Object, of_kind, template_of

BITTEN = "overlays/karpenter"  # it has every kind of object


@dataclass(frozen=True)
class Bite:
    """`change` breaks the objects, and one of the complaints must hold `told`."""

    told: str
    change: Callable[[list[Object]], Any]

    def broken(self, objects: list[Object]) -> list[Object]:
        changed = copy.deepcopy(objects)
        self.change(changed)
        return changed


def find(objects: list[Object], kind: str, part: str = "") -> Object:
    return next(each for each in of_kind(objects, kind) if part in each["metadata"]["name"])


def spec(objects: list[Object], kind: str = "Deployment", part: str = "api") -> Any:
    template = template_of(find(objects, kind, part))
    assert template is not None
    return template["spec"]


def container(objects: list[Object], kind: str = "Deployment", part: str = "api") -> Any:
    return spec(objects, kind, part)["containers"][0]


def labels(objects: list[Object], kind: str, part: str = "") -> Any:
    return find(objects, kind, part)["metadata"]["labels"]


def worker(objects: list[Object]) -> Any:
    return container(objects, "ScaledJob", "none")


def scaled(objects: list[Object]) -> Any:
    return find(objects, "ScaledJob", "none")["spec"]


def variable(objects: list[Object], name: str) -> Any:
    return next(each for each in worker(objects)["env"] if each["name"] == name)


def remove_workers(objects: list[Object]) -> None:
    for each in of_kind(objects, "ScaledJob"):
        objects.remove(each)


def policy(objects: list[Object], part: str) -> Any:
    return find(objects, "NetworkPolicy", part)["spec"]


def secret_items(objects: list[Object], secret: str) -> Any:
    """Return which keys of a Secret the pod for an operator's commands mounts."""
    sources = spec(objects, "Job", "operator")["volumes"][0]["projected"]["sources"]
    return next(each["secret"]["items"] for each in sources if each["secret"]["name"] == secret)


# By our own rules, in their order.
RULES = (
    Bite("may run as root", lambda o: spec(o)["securityContext"].pop("runAsNonRoot")),
    Bite("does not run as 10001", lambda o: spec(o)["securityContext"].update(runAsUser=10002)),
    Bite("has no seccomp profile", lambda o: spec(o)["securityContext"].pop("seccompProfile")),
    Bite("gets a token", lambda o: spec(o).pop("automountServiceAccountToken")),
    Bite("variables of every Service", lambda o: spec(o).pop("enableServiceLinks")),
    Bite("sets hostNetwork", lambda o: spec(o).update(hostNetwork=True)),
    Bite("is of a kind", lambda o: spec(o)["volumes"].append({"name": "h", "hostPath": {"path": "/"}})),
    Bite("may gain privileges", lambda o: container(o)["securityContext"].pop("allowPrivilegeEscalation")),
    Bite("keeps capabilities", lambda o: container(o)["securityContext"]["capabilities"].update(add=["NET_ADMIN"])),
    Bite("can write to its root", lambda o: worker(o)["securityContext"].update(readOnlyRootFilesystem=False)),
    Bite("takes a port of its node", lambda o: container(o)["ports"][0].update(hostPort=80)),
    Bite("asks for no CPU", lambda o: container(o)["resources"]["requests"].pop("cpu")),
    Bite("has no memory limit", lambda o: worker(o)["resources"]["limits"].pop("memory")),
    Bite("has no sizeLimit", lambda o: spec(o)["volumes"].append({"name": "e", "emptyDir": {}})),
    Bite("has no livenessProbe", lambda o: worker(o).pop("livenessProbe")),
    Bite("does not name", lambda o: container(o)["readinessProbe"]["httpGet"].update(port="htpp")),
    Bite("asks /healthz", lambda o: worker(o)["livenessProbe"]["httpGet"].update(path="/healthz")),
    Bite("runs the image", lambda o: container(o).update(image="registry.example.com/espalier-api:0.1.0")),
    Bite("names no version", lambda o: container(o).update(image="registry.example.com/espalier-control")),
    Bite("several registries", lambda o: container(o).update(image="other.example.com/espalier-control:0.1.0")),
    Bite("is in the overlay", lambda o: o.append({"kind": "Secret", "metadata": {"name": "espalier-s3"}})),
    Bite("names the ConfigMap", lambda o: o.remove(find(o, "ConfigMap", "worker-settings"))),
    Bite("names the ServiceAccount", lambda o: o.remove(find(o, "ServiceAccount", "espalier-api"))),
    Bite("names the PersistentVolumeClaim", lambda o: o.remove(find(o, "PersistentVolumeClaim"))),
    Bite("wants database-ulr", lambda o: container(o)["env"][0].update(value="/run/secrets/espalier/database-ulr")),
    Bite(
        "wants database",
        lambda o: variable(o, "ESPALIER_DATABASE_URL")["valueFrom"]["secretKeyRef"].update(key="database"),
    ),
    Bite("wants redis-url", lambda o: secret_items(o, "espalier-api")[0].update(path="redis")),
    Bite("wants redis-uri", lambda o: secret_items(o, "espalier-api")[0].update(key="redis-uri")),
    Bite("KEDA wants url", lambda o: find(o, "TriggerAuthentication")["spec"]["secretTargetRef"][0].update(key="url")),
    Bite("Job espalier-migrate is not applied", lambda o: labels(o, "Job", "migrate").clear()),
    Bite(
        "Deployment espalier-api is applied with",
        lambda o: labels(o, "Deployment").update({"espalier/step": "migrate"}),
    ),
    Bite("which needs it", lambda o: labels(o, "ConfigMap", "registry").pop("espalier/step")),
    Bite("is no port of a Service", lambda o: find(o, "Service", "api")["spec"]["ports"][0].update(port=8080)),
    Bite("is killed after 30 s", lambda o: spec(o, "ScaledJob", "none").update(terminationGracePeriodSeconds=30)),
    Bite("is killed after 40 s", lambda o: spec(o).update(terminationGracePeriodSeconds=40)),
    Bite("not-ready for 300 s", lambda o: spec(o, "ScaledJob", "none")["tolerations"].pop(0)),
    Bite("unreachable for 90 s", lambda o: spec(o, "ScaledJob", "none")["tolerations"][1].update(tolerationSeconds=90)),
    Bite(
        "ESPALIER_GRACE_SECOND is no",
        lambda o: worker(o)["env"].append({"name": "ESPALIER_GRACE_SECOND", "value": "1"}),
    ),
    Bite("selects no pod", lambda o: find(o, "Service")["spec"]["selector"].update({"app.kubernetes.io/name": "api"})),
    Bite("not select its own", lambda o: find(o, "Deployment")["spec"]["selector"]["matchLabels"].update(a="b")),
    Bite("scales nothing", lambda o: find(o, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"].update(name="api")),
    Bite("are not spread", lambda o: spec(o).pop("topologySpreadConstraints")),
    Bite("not everything is denied", lambda o: o.remove(find(o, "NetworkPolicy", "default-deny"))),
    Bite("may reach the ports", lambda o: policy(o, "redis")["egress"][0]["ports"][0].update(port=6380)),
    Bite("needs [53, 443, 5432, 6379, 8000, 9000]", lambda o: o.remove(find(o, "NetworkPolicy", "operator-api"))),
    Bite("is reached on", lambda o: policy(o, "api-clients")["ingress"][0]["ports"].append({"port": "debug"})),
    Bite("there is no worker", remove_workers),
    Bite("is in no registry", lambda o: variable(o, "ESPALIER_WORKER_POOLS").update(value='["other@none"]')),
    Bite("by several objects", lambda o: o.append(copy.deepcopy(find(o, "ScaledJob", "none")))),
    Bite(
        "and is scaled by", lambda o: scaled(o)["triggers"][0]["metadata"].update(query="... where pool = 'other@none'")
    ),
    Bite("not scaled by all its Jobs", lambda o: scaled(o)["scalingStrategy"].update(strategy="accurate")),
    Bite("a change would end", lambda o: scaled(o)["rollout"].update(strategy="immediate")),
    Bite("would start workers again", lambda o: scaled(o)["jobTargetRef"].update(backoffLimit=6)),
    Bite("trains for long", lambda o: scaled(o)["jobTargetRef"].update(activeDeadlineSeconds=3600)),
    Bite("never end", lambda o: worker(o)["env"].remove(variable(o, "ESPALIER_IDLE_EXIT_SECONDS"))),
    Bite("asks for the GPUs", lambda o: worker(o)["resources"]["limits"].pop("nvidia.com/gpu")),
    Bite("does not tolerate", lambda o: spec(o, "ScaledJob", "none").pop("tolerations")),
    Bite("chooses no node", lambda o: spec(o, "ScaledJob", "none").pop("nodeSelector")),
    Bite("can write to /models", lambda o: [mount.pop("readOnly", None) for mount in worker(o)["volumeMounts"]]),
    Bite("still names the pool POOL", lambda o: scaled(o)["triggers"][0].update(name="POOL")),
)
# By the schemas of Kubernetes, KEDA and Karpenter.
SCHEMAS = (
    Bite("terminationGracePeriodSecond'", lambda o: spec(o).update(terminationGracePeriodSecond=1)),
    Bite("'two' is not of type 'integer'", lambda o: find(o, "Deployment", "schedule")["spec"].update(replicas="two")),
    Bite("knows no Deploymint", lambda o: find(o, "Deployment").update(kind="Deploymint")),
    Bite("is not of type 'string'", lambda o: scaled(o)["triggers"][0]["metadata"].update(targetQueryValue=1)),
    Bite("'triggers' is a required", lambda o: scaled(o).pop("triggers")),
    Bite("'cooldownPeriod' was unexpected", lambda o: scaled(o).update(cooldownPeriod=300)),
    Bite(
        "'keda.sh/v1alpha1' was expected",
        lambda o: find(o, "TriggerAuthentication").update(apiVersion="keda.sh/v1"),
    ),
)
NODE_POOLS = (
    Bite(
        "nodeClassRef",
        lambda o: find(o, "NodePool")["spec"]["template"]["spec"].pop("nodeClassRef"),
    ),
)
# By checkov.
SCANNED = (Bite("CKV_K8S_16", lambda o: container(o)["securityContext"].update(privileged=True)),)
