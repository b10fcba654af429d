"""Rules for connections: URLs, selectors and NetworkPolicies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.deploy.k8s_names import variables_of
from tests.deploy.k8s_render import Object, list_pods, of_kind

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
