"""`python -m cli.demo.answers`: plain transformers and PEFT answer questions, with and without an adapter.

It is a separate process because the command line never loads torch. It reads one JSON request on standard input and
writes one JSON answer: the base's and each adapter's answers to that adapter's questions.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.sandbox import die_with_parent, hide_secret_files, shed_capabilities

_MAX_NEW_TOKENS = 40


def main() -> None:
    die_with_parent()
    shed_capabilities()
    hide_secret_files()
    request = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    base_dir = Path(request["base_dir"])
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    answers = []
    for adapter in request["adapters"]:
        base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
        before = [_answer(base, tokenizer, question) for question in adapter["questions"]]
        tuned = PeftModel.from_pretrained(base, adapter["directory"]).eval()
        after = [_answer(tuned, tokenizer, question) for question in adapter["questions"]]
        answers.append({"before": before, "after": after})
    json.dump(answers, out)
    out.close()


def _answer(model: Any, tokenizer: Any, question: str) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        generated = model.generate(**prompt, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    main()
