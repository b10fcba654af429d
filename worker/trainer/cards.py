"""The model card of an adapter, as Hugging Face's README.md: what it is, and how each reader loads it.

A name that a tenant or an operator chose is written only as YAML, a code span, a Python or a shell literal, on one
line. So no name can end its block or become markup.
"""

from __future__ import annotations

import json
import math
import re
import shlex

import yaml

from core.domain.training import AdapterConfig, TrainingSpec
from worker.messages import JobFacts

# The values that vLLM 0.33 accepts for --max-lora-rank (vllm/config/lora.py, MaxLoRARanks).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def write_card(facts: JobFacts, spec: TrainingSpec, *, step: int, metrics: dict[str, float]) -> str:
    """Return the card's text."""
    sections = (
        _front_matter(facts),
        f"# {_code(facts.model_name)}",
        f"A LoRA adapter for {_code(facts.base_model_id)}, trained by Espalier in job {_code(facts.job_id)}.",
        _license_sentence(facts),
        _training(facts, spec, step=step),
        "\n".join(
            ["| metric | value |", "|---|---|", *(f"| {name} | {_round(metrics[name])} |" for name in sorted(metrics))]
        ),
        _peft_section(facts),
        _vllm_section(facts, spec.adapter),
        _ollama_section(spec.adapter),
    )
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: JobFacts) -> str:
    fields: dict[str, object] = {"base_model": facts.base_model_id, "library_name": "peft"}
    if facts.base_license is not None:
        fields["license"] = facts.base_license.lower()  # the hub's identifiers are in lower case
    fields |= {"pipeline_tag": "text-generation", "tags": ["lora", "espalier"]}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, width=math.inf)}---"


def _license_sentence(facts: JobFacts) -> str:
    if facts.base_license is None:
        return "The licence of the base is not known here: ask whoever offers the base before you pass the adapter on."
    return f"The base is licensed under {_code(facts.base_license)}, which binds what is made from it, too."


def _training(facts: JobFacts, spec: TrainingSpec, *, step: int) -> str:
    adapter = spec.adapter
    return "\n".join(
        [
            f"- base revision {_code(facts.base_revision)}, quantization {facts.quantization or 'none'}",
            f"- rank {adapter.rank}, alpha {adapter.alpha:g}, rsLoRA {adapter.use_rslora}",
            f"- target modules {', '.join(_code(name) for name in sorted(adapter.target_modules))}",
            f"- {spec.n_epochs} epochs, batch size {spec.batch_size}, step {step}, seed {spec.seed}",
            f"- learning rate {spec.learning_rate:g}, {spec.learning_rate_schedule}",
        ]
    )


def _peft_section(facts: JobFacts) -> str:
    base = json.dumps(_one_line(facts.base_model_id))
    return f"""## Load with PEFT
In the directory of these files:
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({base})
base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, ".")
```"""


def _vllm_section(facts: JobFacts, adapter: AdapterConfig) -> str:
    max_lora_rank = next((rank for rank in _VLLM_RANKS if rank >= adapter.rank), None)
    if max_lora_rank is None:
        return f"## Serve with vLLM\nvLLM takes ranks up to {_VLLM_RANKS[-1]}; this adapter's is {adapter.rank}."
    base = shlex.quote(_one_line(facts.base_model_id))
    module = shlex.quote(f"{_one_line(facts.model_name)}=.")
    return f"""## Serve with vLLM
```sh
vllm serve {base} --enable-lora --max-lora-rank {max_lora_rank} --lora-modules {module}
```"""


def _ollama_section(adapter: AdapterConfig) -> str:
    """Say how, for readers that know neither rsLoRA nor, where Ollama reads PEFT's files itself, a broken alpha."""
    alpha = adapter.alpha * math.sqrt(adapter.rank) if adapter.use_rslora else adapter.alpha
    parts = ["## Use with Ollama"]
    if adapter.use_rslora:
        parts.append(
            "Ollama and llama.cpp ignore `use_rslora`. Before either reads the files, set `lora_alpha` in "
            f"`adapter_config.json` to alpha times the root of the rank, {alpha:.10g}, and `use_rslora` to false."
        )
    if float(f"{alpha:.10g}").is_integer():
        parts.append("On a base of the Llama, Mistral or Gemma family, Ollama reads these files. The Modelfile:")
        parts.append("```\nFROM BASE\nADAPTER .\n```")
    else:
        parts.append("Ollama reads `lora_alpha` as a whole number, which this one is not, so it needs a GGUF file.")
    parts.append(
        "For other bases, such as Qwen and SmolLM, make a GGUF file with llama.cpp, where `BASE_DIRECTORY` has the "
        "base's `config.json` and tokenizer, and name it in the Modelfile as `ADAPTER ./adapter.gguf`:"
    )
    parts.append(
        "```sh\npython convert_lora_to_gguf.py . --base BASE_DIRECTORY --outfile adapter.gguf --outtype f16\n```"
    )
    return "\n".join(parts)


def _round(number: float) -> str:
    return f"{number:.4f}".rstrip("0").rstrip(".")


def _code(text: str) -> str:
    """Return a code span: its fence is longer than any run of backticks inside (CommonMark 6.1)."""
    text = _one_line(text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def _one_line(text: str) -> str:
    """Return text without the characters that end a line or control a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)
