"""A node without a cluster: runs pod templates as containers, as a kubelet would.

Command, environment, users, groups, capabilities, read-only root, memory limits, volumes with their owners and modes,
probes with their periods and thresholds, the preStop sleep, SIGTERM and the grace are those of the template. What
differs: seccomp is Docker's default profile, an emptyDir has no size limit, and there are no network policies.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.deploy.engine import Engine
from tests.deploy.k8s_render import Object, Pod, of_kind
from tests.waiting import wait_until

_UNITS = {"Mi": "m", "Gi": "g"}


@dataclass(frozen=True)
class Ended:
    """How a pod ended, and how long that took."""

    exit_code: int
    seconds: float


@dataclass
class Node:
    """Runs pods of rendered `objects`, with the values of `secrets` and the directory of each claim."""

    engine: Engine
    objects: list[Object]
    secrets: dict[str, dict[str, str]]
    claims: dict[str, Path]
    directory: Path
    network: str = "espalier-node"
    pods: list[RunningPod] = field(default_factory=list)

    def start(self, pod: Pod, *, alias: str = "") -> RunningPod:
        """Start a pod, and probe it from now on. `alias` is the name of the Service that leads to it."""
        name = f"{pod.name}-{len(self.pods)}"
        place = self.directory / name
        place.mkdir(parents=True)
        (container,) = pod.containers
        words = [*self._walls(pod, container), *self._volumes(pod, container, place)]
        words += ["--env-file", str(self._write_environment(container, name, place / "env"))]
        words += ["--network", self.network, "--hostname", name, *(("--network-alias", alias) if alias else ())]
        command = [*container.get("command", ()), *container.get("args", ())]
        if "command" in container:
            words += ["--entrypoint", command.pop(0)]
        self.engine.docker("run", "--detach", "--name", name, *words, container["image"], *command)
        running = RunningPod(self.engine, name, pod, container)
        self.pods.append(running)
        running.probe()
        return running

    def run_job(self, pod: Pod) -> Ended:
        """Run a Job's pod to its end."""
        started = time.monotonic()
        running = self.start(pod)
        assert running.wait_until_ended() == 0, running.log()
        return Ended(0, time.monotonic() - started)

    def _walls(self, pod: Pod, container: Object) -> list[str]:
        context, own = pod.spec["securityContext"], container["securityContext"]
        words = ["--user", f"{context['runAsUser']}:{context['runAsGroup']}", "--group-add", str(context["fsGroup"])]
        words += [word for name in own["capabilities"]["drop"] for word in ("--cap-drop", name)]
        if own["allowPrivilegeEscalation"] is False:
            words += ["--security-opt", "no-new-privileges"]
        if own["readOnlyRootFilesystem"]:
            words.append("--read-only")
        memory = as_docker_size(container["resources"]["limits"]["memory"])
        return [*words, "--memory", memory, "--memory-swap", memory]

    def _volumes(self, pod: Pod, container: Object, place: Path) -> list[str]:
        group = pod.spec["securityContext"]["fsGroup"]
        paths = {volume["name"]: self._make_volume(volume, place, group=group) for volume in pod.spec["volumes"]}
        words = []
        for mount in container["volumeMounts"]:
            suffix = ":ro" if mount.get("readOnly") else ""
            words += ["--volume", f"{paths[mount['name']]}:{mount['mountPath']}{suffix}"]
        return words

    def _make_volume(self, volume: Object, place: Path, *, group: int) -> Path:
        if "persistentVolumeClaim" in volume:
            return self.claims[volume["persistentVolumeClaim"]["claimName"]]
        path = place / str(volume["name"])
        path.mkdir()
        files, mode = self._files_of(volume)
        for name, text in files.items():
            (path / name).write_text(text, encoding="utf-8")
            os.chown(path / name, 0, group)
            (path / name).chmod(mode)
        os.chown(path, 0, group)
        path.chmod(0o2755 if files else 0o2777)
        return path

    def _files_of(self, volume: Object) -> tuple[dict[str, str], int]:
        if "configMap" in volume:
            return self._config(volume["configMap"]["name"]), 0o644
        if "secret" in volume:
            return self.secrets[volume["secret"]["secretName"]], volume["secret"]["defaultMode"]
        sources = volume.get("projected", {}).get("sources", ())
        files = {name: text for source in sources for name, text in self._project(source["secret"]).items()}
        return files, volume.get("projected", {}).get("defaultMode", 0)

    def _project(self, source: Object) -> dict[str, str]:
        """Return the files of a Secret: all of its keys, or those of `items` only."""
        held = self.secrets[source["name"]]
        items = source.get("items") or [{"key": key, "path": key} for key in held]
        return {item["path"]: held[item["key"]] for item in items}

    def _config(self, name: str) -> dict[str, str]:
        (found,) = (each for each in of_kind(self.objects, "ConfigMap") if each["metadata"]["name"] == name)
        return dict(found["data"])

    def _write_environment(self, container: Object, pod_name: str, path: Path) -> Path:
        values: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            values |= self._config(source["configMapRef"]["name"])
        for each in container.get("env", ()):
            values[each["name"]] = self._value_of(each, pod_name)
        path.touch(mode=0o600)
        path.write_text("".join(f"{name}={value}\n" for name, value in values.items()), encoding="utf-8")
        return path

    def _value_of(self, variable: Object, pod_name: str) -> str:
        if "value" in variable:
            return str(variable["value"])
        source: Any = variable["valueFrom"]
        if "fieldRef" in source:
            assert source["fieldRef"]["fieldPath"] == "metadata.name"
            return pod_name
        return self.secrets[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]]


class RunningPod:
    """A container that is probed as its template says. `is_doomed` once a kubelet would have killed it."""

    def __init__(self, engine: Engine, name: str, pod: Pod, container: Object) -> None:
        self._engine, self.name, self.pod, self._container = engine, name, pod, container
        self.address = engine.docker(
            "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name
        ).strip()
        self.is_ready = self.is_doomed = self._is_stopping = False
        self.started_at = time.monotonic()

    @property
    def is_alive(self) -> bool:
        return self._inspect("{{.State.Running}}") == "true"

    @property
    def exit_code(self) -> int:
        return int(self._inspect("{{.State.ExitCode}}"))

    def log(self) -> str:
        done = self._engine.try_docker("logs", "--tail", "60", self.name)
        return f"{self.name}:\n{done.stdout}{done.stderr}"

    def execute(self, *words: str) -> str:
        return self._engine.docker("exec", self.name, *words)

    def wait_until_ready(self) -> float:
        """Return after how many seconds it was ready."""
        wait_until(lambda: self.is_ready or self.is_doomed, what=f"{self.name} to be ready")
        assert self.is_ready, self.log()
        return time.monotonic() - self.started_at

    def wait_until_ended(self) -> int:
        """Return the exit status, once there is one."""
        return int(self._engine.docker("wait", self.name))

    def stop(self) -> Ended:
        """Delete it as the API server would: the preStop sleep, SIGTERM, and SIGKILL when the grace is over."""
        self._is_stopping = True
        started = time.monotonic()
        grace = self.pod.spec["terminationGracePeriodSeconds"]
        pause = self._container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        time.sleep(pause)
        self._engine.docker("stop", "--time", str(grace - pause), self.name)
        return Ended(self.exit_code, time.monotonic() - started)

    def remove(self) -> None:
        """Remove it whatever it does. Nobody probes it any more."""
        self._is_stopping = True
        self._engine.try_docker("rm", "--force", "--volumes", self.name)

    def probe(self) -> None:
        threading.Thread(target=self._probe_forever, daemon=True).start()

    def _probe_forever(self) -> None:
        if (startup := self._container.get("startupProbe")) and not self._passes_in_time(startup):
            self.is_doomed = not self._is_stopping
            return
        liveness, readiness = self._container.get("livenessProbe"), self._container.get("readinessProbe")
        for each, heed in ((readiness, self._heed_readiness), (liveness, self._heed_liveness)):
            if each is not None:
                threading.Thread(target=self._repeat, args=(each, heed), daemon=True).start()

    def _passes_in_time(self, probe: Object) -> bool:
        for _ in range(probe["failureThreshold"]):
            if self._passes(probe):
                return True
            if not self.is_alive:
                return False
            time.sleep(probe["periodSeconds"])
        return False

    def _repeat(self, probe: Object, heed: Any) -> None:
        time.sleep(probe.get("initialDelaySeconds", 0))
        num_failures = 0
        while not self._is_stopping and not self.is_doomed:
            num_failures = 0 if self._passes(probe) else num_failures + 1
            if not self._is_stopping:
                heed(num_failures, probe.get("failureThreshold", 3))
            time.sleep(probe["periodSeconds"])

    def _heed_readiness(self, num_failures: int, threshold: int) -> None:
        if num_failures in (0, threshold):
            self.is_ready = not num_failures

    def _heed_liveness(self, num_failures: int, threshold: int) -> None:
        self.is_doomed |= num_failures >= threshold and self.is_alive

    def _passes(self, probe: Object) -> bool:
        timeout_seconds = probe.get("timeoutSeconds", 1)
        target = probe.get("httpGet") or probe["tcpSocket"]
        (port,) = (each["containerPort"] for each in self._container["ports"] if each["name"] == target["port"])
        try:
            if "path" not in target:
                socket.create_connection((self.address, port), timeout=timeout_seconds).close()
                return True
            url = f"http://{self.address}:{port}{target['path']}"
            return httpx.get(url, timeout=timeout_seconds, trust_env=False).is_success
        except (OSError, httpx.HTTPError):
            return False

    def _inspect(self, form: str) -> str:
        return self._engine.docker("inspect", "--format", form, self.name).strip()


def as_docker_size(quantity: str) -> str:
    return quantity[:-2] + _UNITS[quantity[-2:]]
