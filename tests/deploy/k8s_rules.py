"""Rules for every overlay that no schema contains. A rule yields one sentence for each violation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import yaml

from tests.deploy.k8s_names import names_lead_somewhere, the_migration_can_be_applied_first, variables_are_settings
from tests.deploy.k8s_network import selectors_find_pods, traffic_is_named, urls_lead_to_services
from tests.deploy.k8s_pods import containers_are_bounded, images_are_ours, pods_are_restricted, processes_are_probed
from tests.deploy.k8s_render import Object, list_pods, template_of
from tests.deploy.k8s_workers import (
    gpus_are_asked_for_whole,
    pools_are_whole,
    weights_are_read_only,
    workers_drain_in_time,
    workers_leave_dead_nodes,
)


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
