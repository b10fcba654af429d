"""A model card is valid for Hugging Face, its instructions work, and no name in it becomes markup."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from transformers import AutoModelForCausalLM

from tests.factories.tiny_bases import write_tiny_base
from tests.unit.engine.tiny import make_engine, make_job, train
from worker.messages import JobFacts
from worker.trainer.cards import write_card

HOSTILE = (
    "a: b\n---\nlicense: mit",
    "`<script>alert(1)</script>`",
    "``` \n```\n# Owned",
    "]( http://x ) ![x](y) | x",
    "x'; rm -rf ~; echo '",
    'x"); import os #',
    "- *x* & \u202eabc\x1b[31m\u2028# Owned",
    "!!python/object:os.system {x}",
)
HEADINGS = 4  # the name, and one for each way to load it


def make_card(
    *,
    base_model_id: str = "tiny/llama",
    model_name: str = "ft:tiny/llama:acme::12345678",
    base_license: str | None = "Apache-2.0",
    base_revision: str = "1",
    **adapter: Any,
) -> str:
    facts = JobFacts(
        job_id="ftjob-1",
        tenant="acme",
        model_name=model_name,
        base_model_id=base_model_id,
        base_revision=base_revision,
        quantization=None,
        created_at=0,
        base_license=base_license,
    )
    return write_card(facts, make_job("mine", **adapter).spec, step=2, metrics={"step": 20.0, "train_loss": 1.23456})


def front_matter(card: str) -> dict[str, Any]:
    _, block, _ = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    found: dict[str, Any] = yaml.safe_load(block)
    return found


def body(card: str) -> str:
    return re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)[2]


def fences(card: str, language: str) -> list[str]:
    found = [token for token in MarkdownIt("commonmark").parse(body(card)) if token.type == "fence"]
    return [token.content for token in found if token.info == language]


def test_the_front_matter_is_what_hugging_face_reads() -> None:
    assert front_matter(make_card()) == {
        "base_model": "tiny/llama",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "espalier"],
    }


def test_a_licence_that_is_not_known_is_left_out_and_said_so() -> None:
    card = make_card(base_license=None)
    assert "license" not in front_matter(card)
    assert "The licence of the base is not known here" in card


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_that_others_chose_are_data_in_yaml_markdown_and_the_shell(hostile: str) -> None:
    card = make_card(base_model_id=hostile, model_name=hostile, base_license=hostile, base_revision=hostile)
    expected = front_matter(make_card()) | {"base_model": hostile, "license": hostile.lower()}
    assert front_matter(card) == expected
    tokens = MarkdownIt("commonmark").enable("table").parse(body(card))
    inline = [child.type for token in tokens for child in token.children or ()]
    assert set(inline) <= {"text", "code_inline", "softbreak"}
    assert not any(token.type.startswith("html") for token in tokens)
    assert [token.type for token in tokens].count("heading_open") == HEADINGS
    assert len(card.splitlines()) - len(make_card().splitlines()) == len(yaml_lines(card)) - len(
        yaml_lines(make_card())
    )
    (python,) = fences(card, "python")
    compile(python, "card", "exec")
    one_line = "".join(character if character.isprintable() else " " for character in hostile)
    words = shlex.split(fences(card, "sh")[0])
    assert words == [
        "vllm", "serve", one_line, "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{one_line}=.",
    ]  # fmt: skip


def yaml_lines(card: str) -> list[str]:
    return card[: len(card) - len(body(card))].splitlines()


@pytest.mark.parametrize(
    ("rank", "needed"), [(1, 1), (2, 8), (8, 8), (9, 16), (33, 64), (129, 256), (257, 320), (512, 512)]
)
def test_vllm_is_started_with_a_rank_that_it_takes(rank: int, needed: int) -> None:
    assert f" --max-lora-rank {needed} " in make_card(rank=rank)


def test_a_rank_that_no_vllm_takes_is_said_instead() -> None:
    card = make_card(rank=513)
    assert "vLLM takes ranks up to 512; this adapter's is 513." in card
    assert "vllm serve" not in card


@pytest.mark.parametrize(
    ("adapter", "says", "omits"),
    [
        ({"rank": 16, "alpha": 32.0}, ("ADAPTER .\n",), ("use_rslora", "whole number")),
        ({"rank": 16, "alpha": 9.5}, ("whole number",), ("ADAPTER .\n",)),
        (
            {"rank": 16, "alpha": 32.0, "use_rslora": True},
            ("alpha times the root of the rank, 128,", "ADAPTER .\n"),
            ("whole number",),
        ),
        ({"rank": 8, "alpha": 16.0, "use_rslora": True}, ("45.2548", "whole number"), ("ADAPTER .\n",)),
    ],
)
def test_ollama_is_given_what_it_can_read(
    adapter: dict[str, Any], says: tuple[str, ...], omits: tuple[str, ...]
) -> None:
    card = make_card(**adapter)
    assert all(words in card for words in says)
    assert not any(words in card for words in omits)
    assert "convert_lora_to_gguf.py . --base BASE_DIRECTORY" in card


def test_the_cards_own_code_loads_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_tiny_base(tmp_path / "base")
    engine = make_engine(AutoModelForCausalLM.from_pretrained(base))
    engine.admit(make_job("mine"))
    train(engine, num_fused_steps=2)
    engine.export_adapter("mine", tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    (snippet,) = fences(make_card(base_model_id=str(base)), "python")
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 for a property that the latter has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        exec(snippet, names)
    ids = torch.tensor([[1, 2, 3]])
    adapted = names["model"](input_ids=ids).logits
    with names["model"].disable_adapter():
        assert not torch.equal(adapted, names["model"](input_ids=ids).logits)
    assert len(names["tokenizer"]("Hello")["input_ids"]) > 0


def test_metrics_stand_in_the_card_without_needless_zeros() -> None:
    assert "| step | 20 |\n| train_loss | 1.2346 |\n" in make_card()
