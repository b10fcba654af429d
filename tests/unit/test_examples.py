"""What an example passes to a program that no test can start."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VLLM = '#!/bin/sh\nfor each in "$@"; do printf "%s\\n" "$each"; done\n'


def serve(directory: Path, *arguments: str, rank: int) -> list[str]:
    """Run the example on an adapter of this rank, and return what vLLM is called with."""
    adapter = directory / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": "acme-labs/tiny-llama", "lora_alpha": 32, "r": rank, "rank_pattern": {}}
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (directory / "vllm").write_text(VLLM)
    (directory / "vllm").chmod(0o755)
    argv = [str(ROOT / "examples/serve_with_vllm.sh"), "adapter", *arguments]
    env = {"PATH": f"{directory}:{os.environ['PATH']}"}
    return subprocess.run(argv, cwd=directory, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


# What vLLM takes as --max-lora-rank (0.33: vllm/config/lora.py), each the least that holds the adapter.
@pytest.mark.parametrize(("rank", "most"), [(4, 8), (8, 8), (16, 16), (24, 32), (64, 64)])
def test_vllm_is_told_a_rank_that_holds_the_adapter(tmp_path: Path, rank: int, most: int) -> None:
    told = serve(tmp_path, "docs", rank=rank)
    assert told == [
        *("serve", "acme-labs/tiny-llama", "--enable-lora"),
        *("--max-lora-rank", str(most), "--lora-modules", "docs=adapter"),
    ]


def test_an_adapter_without_a_name_has_its_directorys(tmp_path: Path) -> None:
    assert "adapter=adapter" in serve(tmp_path, rank=16)


def test_further_options_are_vllms(tmp_path: Path) -> None:
    assert serve(tmp_path, "docs", "--port", "8001", rank=16)[-2:] == ["--port", "8001"]
