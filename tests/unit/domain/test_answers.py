"""What is learnt of a conversation under each shape of chat template, character by character."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from functools import cache
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from core.domain.datasets import ChatExample, ChatMessage
from core.domain.datasets.rendering import as_dicts
from core.domain.datasets.tokenizers import BaseTokenizer, RenderingError
from core.domain.datasets.tokens import ConversationTokenizer, TokenizedConversation
from tests.chat_templates import (
    ASSISTANT,
    CHATML,
    SYSTEM,
    THOUGHT,
    TRAINABLE,
    TWO_TURNS,
    UNTRAINABLE,
    USER,
    ChatTemplate,
    Turns,
)

WRITTEN = [
    pytest.param(name, turns, id=f"{name}, {number}")
    for name, template in TRAINABLE.items()
    for number, turns in enumerate(template.written, start=1)
]
# These write every answer alike, wherever it stands and whatever is in it.
UNCONDITIONAL = ("Alpaca", "ChatML", "Gemma 3", "Llama 3", "Mistral", "Phi-3.5", "gpt-oss")


@cache
def tokenizers_of(name: str) -> tuple[BaseTokenizer, ConversationTokenizer]:
    base = TRAINABLE[name].make_tokenizer()
    return base, ConversationTokenizer(base)


@cache
def backend_of(name: str) -> Tokenizer:
    return Tokenizer.from_str(TRAINABLE[name].make_bundle().backend)


def converse(turns: Turns, *, weights: tuple[int, ...] = ()) -> ChatExample:
    given_weights = weights or (1,) * len(turns)
    return ChatExample(
        tuple(ChatMessage(role, content, weight) for (role, content), weight in zip(turns, given_weights, strict=True))
    )


def split_learnt(name: str, made: TokenizedConversation) -> list[tuple[bool, str]]:
    """Return a conversation's text in stretches, each with whether it is learnt."""
    backend = backend_of(name)
    pairs = zip(made.is_label, made.token_ids, strict=True)
    return [
        (is_learnt, backend.decode([token_id for _, token_id in stretch], skip_special_tokens=False))
        for is_learnt, stretch in groupby(pairs, key=lambda pair: pair[0])
    ]


def show_learnt(name: str, made: TokenizedConversation) -> str:
    """Return a conversation's text with what is learnt between « and »."""
    return "".join(f"«{text}»" if is_learnt else text for is_learnt, text in split_learnt(name, made))


@pytest.mark.parametrize(("name", "turns"), WRITTEN)
def test_a_conversation_is_learnt_as_was_written_by_hand(name: str, turns: Turns) -> None:
    made = tokenizers_of(name)[1].tokenize(converse(turns))
    expected = TRAINABLE[name].written[turns]
    assert show_learnt(name, made) == expected
    assert made.num_left_out_turns == sum(role == ASSISTANT for role, _ in turns) - expected.count("«")


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_base_whose_answers_can_be_learnt_with_their_end_is_accepted(name: str) -> None:
    tokenizers_of(name)[1].check_template()


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_a_base_whose_answers_cannot_be_learnt_with_their_end_is_refused_in_words(name: str) -> None:
    template, complaint = UNTRAINABLE[name]
    with pytest.raises(RenderingError, match=complaint):
        ConversationTokenizer(template.make_tokenizer()).check_template()


def test_the_end_of_sequence_token_ends_a_turn_whether_or_not_it_is_marked_as_special() -> None:
    template = replace(TRAINABLE["Alpaca"], controls=(), words=("</s>",))
    conversations = ConversationTokenizer(template.make_tokenizer())
    conversations.check_template()
    assert conversations.tokenize(converse(TWO_TURNS)).num_labels == 8  # two times "X", ".", "\n" and "</s>"


def test_a_template_that_writes_the_time_writes_one_time_for_all_rows() -> None:
    template = replace(CHATML, source="{{ strftime_now('%H:%M:%S.%f') }}" + CHATML.source)
    base = template.make_tokenizer()
    now = dt.datetime(2026, 2, 28, 23, 59, 59, 999999)  # noqa: DTZ001 (the local time)
    at_midnight = ConversationTokenizer(base, now=now)
    made = [at_midnight.tokenize(converse(TWO_TURNS)) for _ in range(2)]
    assert made[0] == made[1]
    assert made[0].num_left_out_turns == 0
    assert "".join(map(base.show_token, made[0].token_ids)).startswith("23:59:59.999999<|im_start|>")
    assert ConversationTokenizer(base).tokenize(converse(TWO_TURNS)).num_left_out_turns == 0


def test_an_answer_of_weight_0_is_not_counted_as_left_out_and_does_not_choose_the_prompt() -> None:
    made = tokenizers_of("Qwen3")[1].tokenize(converse(TWO_TURNS, weights=(1, 1, 1, 0)))
    assert show_learnt("Qwen3", made) == (
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nSo.<|im_end|>\n"
    )
    assert made.num_left_out_turns == 0


def test_a_thought_that_the_template_drops_from_the_only_answer_is_refused() -> None:
    dropping = ChatTemplate(
        source=CHATML.source.replace("m.content +", "m.content.split('</think>')[-1].strip() +"),
        eos_token=CHATML.eos_token,
        controls=CHATML.controls,
    )
    conversations = ConversationTokenizer(dropping.make_tokenizer())
    with pytest.raises(RenderingError, match="leaves out a part of message 2 of this conversation"):
        conversations.tokenize(converse(THOUGHT))
    made = conversations.tokenize(converse((*THOUGHT, *TWO_TURNS[2:])))
    assert made.num_left_out_turns == 1


def test_a_users_words_that_the_template_acts_on_stay_words() -> None:
    """The template of Qwen3 looks for tags of tools in what a user says."""
    base, conversations = tokenizers_of("Qwen3")
    turns = ((USER, "<tool_response> a </think> <|im_end|>\n<|im_end|></tool_response>"), *THOUGHT)
    made = conversations.tokenize(converse(turns))
    assert made.token_ids.count(base.encode(["<|im_end|>"])[0].token_ids[0]) == 3
    assert show_learnt("Qwen3", made).endswith("«<think>\nhm\n</think>\n\nYes.<|im_end|>»\n")


WORDS = st.text(st.characters(max_codepoint=0x24F, exclude_categories=["Cs", "Cc"]), max_size=12)
PARTS = st.one_of(
    WORDS,
    st.sampled_from(["\n", " ", "\n\n", "<|im_end|>", "</s>", "[/INST]", "<|end|>", "user", "### Response:\n", "«"]),
)
SAID = st.lists(PARTS, min_size=1, max_size=4).map("".join).filter(str.strip)
THOUGHTS = st.one_of(st.just(""), WORDS.filter(str.strip).map("<think>\n{}\n</think>\n\n".format))


@given(
    name=st.sampled_from(sorted(TRAINABLE)),
    system=st.one_of(st.none(), SAID),
    turns=st.lists(st.tuples(SAID, THOUGHTS, SAID, st.sampled_from([0, 1])), min_size=1, max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_under_any_template_answers_are_learnt_with_their_end_after_the_prompt_that_a_server_sends(
    name: str, system: str | None, turns: list[tuple[str, str, str, int]]
) -> None:
    base, conversations = tokenizers_of(name)
    messages = [ChatMessage(SYSTEM, system)] if system is not None else []
    for question, thought, answer, weight in turns:
        messages += [ChatMessage(USER, question), ChatMessage(ASSISTANT, thought + answer, weight)]
    example = ChatExample(tuple(messages))
    made = conversations.tokenize(example)

    stretches = split_learnt(name, made)
    shown = [
        ("".join(text for _, text in stretches[:place]), learnt)
        for place, (is_learnt, learnt) in enumerate(stretches)
        if is_learnt
    ]
    weighted = [index for index, each in enumerate(messages) if each.role == ASSISTANT and each.weight]
    assert len(shown) + made.num_left_out_turns == len(weighted)
    assert made.num_left_out_turns == 0 or name not in UNCONDITIONAL
    unmatched = list(weighted)
    for before, learnt in shown:
        index = next(index for index in unmatched if before in prompts_of(base, example, index))
        del unmatched[: unmatched.index(index) + 1]
        _, _, said = messages[index].content.rpartition("</think>")
        end = next(each for each in base.control_tokens.values() if learnt.endswith(each))
        assert learnt.removesuffix(end).rstrip().endswith(said.strip())
        assert "<think>\n\n</think>" not in learnt
        assert "<think></think>" not in learnt


def prompts_of(base: BaseTokenizer, example: ChatExample, index: int) -> set[str]:
    asked = as_dicts(ChatExample(example.messages[:index]))
    return {
        base.render(asked, add_generation_prompt=True),
        base.render(asked, add_generation_prompt=True, enable_thinking=False),
    }
