"""The examples and the README's snippet do what their pages say, against the whole service with a real worker."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from peft import PeftConfig
from safetensors import safe_open

from local.stack import LocalStack
from tests.e2e.lab import BASE_MODEL

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text()
PLAIN = {"PATH": os.environ["PATH"], "no_proxy": "127.0.0.1"}


def block_after(sentence: str, fence: str) -> str:
    """The README's first block of this kind after a sentence."""
    found = re.search(rf"^```{fence}\n(.*?)^```$", README.split(sentence)[1], re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def run(argv: list[str], directory: Path, env: Mapping[str, str]) -> str:
    done = subprocess.run(argv, cwd=directory, env={**PLAIN, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_adapter(directory: Path) -> None:
    """It is whole, and plain PEFT reads it."""
    manifest = json.loads((directory / "manifest.json").read_text())
    for file in manifest["files"]:
        assert hashlib.sha256((directory / file["name"]).read_bytes()).hexdigest() == file["sha256"]
    assert PeftConfig.from_pretrained(str(directory)).base_model_name_or_path == BASE_MODEL
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as tensors:
        assert len(tensors.keys()) > 0


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    run(["sh", "-c", block_after("make a file of rows", "sh")], tmp_path, {})
    return tmp_path / "rows.jsonl"


@pytest.fixture
def env(stack: LocalStack) -> dict[str, str]:
    return {"ESPALIER_URL": f"{stack.api_url}/v1", "ESPALIER_API_KEY": stack.create_tenant("acme")}


def test_the_example_in_python_ends_with_a_verified_adapter(rows: Path, env: dict[str, str], tmp_path: Path) -> None:
    argv = [sys.executable, str(EXAMPLES / "follow_to_adapter.py"), str(rows), "adapter", BASE_MODEL]
    told = run(argv, tmp_path, env)
    check_adapter(tmp_path / "adapter")
    assert "The job has successfully completed." in told
    assert told.count("training loss=") >= 2


def test_the_example_in_python_says_what_is_wrong_with_a_file(rows: Path, env: dict[str, str], tmp_path: Path) -> None:
    rows.write_text('{"messages": []}\n')
    argv = [sys.executable, str(EXAMPLES / "follow_to_adapter.py"), str(rows), "adapter", BASE_MODEL]
    done = subprocess.run(argv, cwd=tmp_path, env={**PLAIN, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has problems: " in done.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_example_with_curl_ends_with_a_verified_adapter(rows: Path, env: dict[str, str], tmp_path: Path) -> None:
    told = run([str(EXAMPLES / "curl_only.sh"), str(rows), "adapter", BASE_MODEL], tmp_path, env)
    check_adapter(tmp_path / "adapter")
    assert "adapter_model.safetensors: OK" in told
    assert "training loss=" in told


def test_the_snippet_of_the_readme_ends_with_the_adapter(rows: Path, env: dict[str, str], tmp_path: Path) -> None:
    snippet = block_after("## Use it", "python").replace("http://127.0.0.1:8000/v1", env["ESPALIER_URL"])
    snippet = snippet.replace("esp_live_...", env["ESPALIER_API_KEY"])
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in snippet
    snippet = snippet.replace("HuggingFaceTB/SmolLM2-135M-Instruct", BASE_MODEL)
    assert rows.exists()
    run([sys.executable, "-c", snippet], tmp_path, {})
    check_adapter(tmp_path / "adapter")
