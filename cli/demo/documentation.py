"""The demo's data: what functions of Python's standard library do, in the words of their own docstrings.

The service exists for this case: a company teaches a model its own documentation. Training asks about a function in
some words, and validation asks about the same function in other words. So the validation loss shows how far the facts
were learnt beyond the wording of the questions.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from dataclasses import dataclass

TRAINING_QUESTIONS = ("What does {name} do?", "Explain {name} in one sentence.")
VALIDATION_QUESTION = "In short, what is {name} for?"
_MAX_ANSWER_CHARACTERS = 140


@dataclass(frozen=True)
class Documentation:
    """One team's dataset: JSON Lines for training and validation, and some questions to ask before and after."""

    training: bytes
    validation: bytes
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def build_documentation(modules: tuple[str, ...], *, num_facts: int) -> Documentation:
    """Build a dataset from the first `num_facts` documented functions and classes of the modules."""
    facts = [fact for module in modules for fact in _read_module(module)][:num_facts]
    training = [_row(question.format(name=name), answer) for question in TRAINING_QUESTIONS for name, answer in facts]
    validation = [_row(VALIDATION_QUESTION.format(name=name), answer) for name, answer in facts]
    asked = facts[:2]
    return Documentation(
        training="\n".join(training).encode(),
        validation="\n".join(validation).encode(),
        questions=tuple(TRAINING_QUESTIONS[0].format(name=name) for name, _ in asked),
        answers=tuple(answer for _, answer in asked),
    )


def _read_module(module_name: str) -> list[tuple[str, str]]:
    module = importlib.import_module(module_name)
    facts = []
    for name in sorted(dir(module)):
        thing = getattr(module, name)
        if name.startswith("_") or not callable(thing) or getattr(thing, "__module__", module_name) != module_name:
            continue
        if answer := _first_sentence(inspect.getdoc(thing) or ""):
            facts.append((f"{module_name}.{name}", answer))
    return facts


def _first_sentence(docstring: str) -> str | None:
    """Return the first sentence of prose, or None if the docstring begins with a signature or it is too long."""
    for paragraph in docstring.split("\n\n"):
        text = " ".join(paragraph.split())
        sentence = re.split(r"(?<=[.!])\s", text, maxsplit=1)[0]
        if "->" not in sentence and sentence.endswith(".") and 20 <= len(sentence) <= _MAX_ANSWER_CHARACTERS:  # noqa: PLR2004
            return sentence
    return None


def _row(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages})
