"""Chat templates in the styles of real bases, each with its output and the part that is learnt, written by hand.

The templates are written for these tests. What matters in each is where it puts words, what ends a turn, and what it
writes when a server asks for an answer. Learnt characters are between « and ».

Templates repeat one another, as those of real bases do: each must be readable by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

from tokenizers import AddedToken, Tokenizer

from core.domain.datasets.tokenizers import BaseTokenizer, TokenizerBundle
from tests.bundles import load_smollm2_tokenizer

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
Turns = tuple[tuple[str, str], ...]
ONE_TURN: Turns = ((SYSTEM, "Be kind."), (USER, "Hi?"), (ASSISTANT, "Yes."))
NO_SYSTEM: Turns = ONE_TURN[1:]
TWO_TURNS: Turns = (*NO_SYSTEM, (USER, "Why?"), (ASSISTANT, "So."))
THOUGHT: Turns = ((USER, "Hi?"), (ASSISTANT, "<think>\nhm\n</think>\n\nYes."))
TWO_THOUGHTS: Turns = (*THOUGHT, (USER, "Why?"), (ASSISTANT, "<think>\noh\n</think>\n\nSo."))


@dataclass(frozen=True)
class ChatTemplate:
    """`written` is each conversation as it is rendered, with what is learnt between « and ».

    `controls` are the tokens that the base marks as special; `words` are added tokens that it does not.
    """

    source: str
    eos_token: str
    controls: tuple[str, ...]
    written: dict[Turns, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    bos_token: str = ""

    def make_bundle(self) -> TokenizerBundle:
        special_tokens = {"eos_token": self.eos_token} | ({"bos_token": self.bos_token} if self.bos_token else {})
        return TokenizerBundle(
            backend=_make_backend(self.controls, self.words), chat_template=self.source, special_tokens=special_tokens
        )

    def make_tokenizer(self) -> BaseTokenizer:
        return BaseTokenizer(self.make_bundle())


@cache
def _make_backend(controls: tuple[str, ...], words: tuple[str, ...]) -> str:
    backend = Tokenizer.from_str(load_smollm2_tokenizer().backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in controls])
    backend.add_tokens([AddedToken(each, special=False, normalized=False) for each in words])
    return str(backend.to_str())


CHATML = ChatTemplate(
    source=r"""
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}""",
    eos_token="<|im_end|>",
    controls=("<|im_start|>", "<|im_end|>"),
    written={
        ONE_TURN: "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
        "<|im_start|>assistant\n«Yes.<|im_end|>»\n",
        TWO_TURNS: "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n«So.<|im_end|>»\n",
        THOUGHT: "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n«<think>\nhm\n</think>\n\nYes.<|im_end|>»\n",
    },
)

LLAMA_3 = ChatTemplate(
    source=r"""
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}""",
    bos_token="<|begin_of_text|>",
    eos_token="<|eot_id|>",
    controls=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    written={
        ONE_TURN: "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»",
        TWO_TURNS: "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«So.<|eot_id|>»",
    },
)

GEMMA_3 = ChatTemplate(
    source=r"""
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set first = messages[0].content + '\n\n' %}
{%- set turns = messages[1:] %}
{%- else %}
{%- set first = '' %}
{%- set turns = messages %}
{%- endif %}
{%- for m in turns %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must take turns.') }}
{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}
{{- m.content | trim }}
{{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\n' }}
{%- endif %}""",
    bos_token="<bos>",
    eos_token="<eos>",
    controls=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    written={
        ONE_TURN: "<bos><start_of_turn>user\nBe kind.\n\nHi?<end_of_turn>\n<start_of_turn>model\n«Yes.<end_of_turn>»\n",
        TWO_TURNS: "<bos><start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\n«Yes.<end_of_turn>»\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n«So.<end_of_turn>»\n",
    },
)

PHI_3_5 = ChatTemplate(
    source=r"""
{%- for m in messages %}
{{- '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}
{%- endfor %}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token }}""",
    eos_token="<|endoftext|>",
    controls=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    written={
        ONE_TURN: "<|system|>\nBe kind.<|end|>\n<|user|>\nHi?<|end|>\n<|assistant|>\n«Yes.<|end|>»\n<|endoftext|>",
        TWO_TURNS: "<|user|>\nHi?<|end|>\n<|assistant|>\n«Yes.<|end|>»\n"
        "<|user|>\nWhy?<|end|>\n<|assistant|>\n«So.<|end|>»\n<|endoftext|>",
    },
)

MISTRAL = ChatTemplate(
    source=r"""
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set first = messages[0].content + '\n\n' %}
{%- set turns = messages[1:] %}
{%- else %}
{%- set first = '' %}
{%- set turns = messages %}
{%- endif %}
{%- for m in turns %}
{%- if m.role == 'user' %}
{{- '[INST] ' + (first if loop.first else '') + m.content + ' [/INST]' }}
{%- else %}
{{- ' ' + m.content + eos_token }}
{%- endif %}
{%- endfor %}""",
    bos_token="<s>",
    eos_token="</s>",
    controls=("<s>", "</s>", "[INST]", "[/INST]"),
    written={
        ONE_TURN: "<s>[INST] Be kind.\n\nHi? [/INST]« Yes.</s>»",
        TWO_TURNS: "<s>[INST] Hi? [/INST]« Yes.</s>»[INST] Why? [/INST]« So.</s>»",
    },
)

# Thoughts of answers before the last question are dropped. The last answer always has a think block.
_QWEN_3_TURNS = r"""
{%- set ns = namespace(last_question=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
{%- set ns.last_question = loop.index0 %}
{%- endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role != 'assistant' %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- else %}
{%- set content = m.content %}
{%- set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last_question and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}
{{- content }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}"""
_QWEN_TOKENS = {
    "eos_token": "<|im_end|>",
    "controls": ("<|im_start|>", "<|im_end|>"),
    "words": ("<think>", "</think>"),
}

QWEN_3 = ChatTemplate(
    source=_QWEN_3_TURNS
    + r"""
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}
{%- endif %}""",
    written={
        ONE_TURN: "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n«Yes.<|im_end|>»\n",
        # The first answer stands without the think block that the last one has: a server would not ask for it so.
        TWO_TURNS: "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n«So.<|im_end|>»\n",
        THOUGHT: "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n«<think>\nhm\n</think>\n\nYes.<|im_end|>»\n",
        TWO_THOUGHTS: "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n«<think>\noh\n</think>\n\nSo.<|im_end|>»\n",
    },
    **_QWEN_TOKENS,  # type: ignore[arg-type]
)

# It always thinks: the prompt opens the thought, and an answer without one is none that it could be asked for.
QWEN_3_THINKING = ChatTemplate(
    source=_QWEN_3_TURNS
    + r"""
{{- '<think>\n' }}
{%- endif %}""",
    written={
        ONE_TURN: "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nYes.<|im_end|>\n",
        THOUGHT: "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n<think>\n«hm\n</think>\n\nYes.<|im_end|>»\n",
        TWO_THOUGHTS: "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n«oh\n</think>\n\nSo.<|im_end|>»\n",
    },
    **_QWEN_TOKENS,  # type: ignore[arg-type]
)

# The model names the channel itself; the end of the last turn is another token than that of the others.
GPT_OSS = ChatTemplate(
    source=r"""
{{- '<|start|>system<|message|>Reasoning: medium<|end|>' }}
{%- for m in messages %}
{%- if '<|channel|>analysis<|message|>' in m.content %}
{{- raise_exception('The thought belongs in a field of its own.') }}
{%- endif %}
{%- if m.role == 'system' %}
{{- '<|start|>developer<|message|># Instructions\n\n' + m.content + '<|end|>' }}
{%- elif m.role == 'user' %}
{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
{%- else %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start|>assistant' }}
{%- endif %}""",
    eos_token="<|return|>",
    controls=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
    written={
        ONE_TURN: "<|start|>system<|message|>Reasoning: medium<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe kind.<|end|><|start|>user<|message|>Hi?<|end|>"
        "<|start|>assistant«<|channel|>final<|message|>Yes.<|return|>»",
        TWO_TURNS: "<|start|>system<|message|>Reasoning: medium<|end|><|start|>user<|message|>Hi?<|end|>"
        "<|start|>assistant«<|channel|>final<|message|>Yes.<|end|>»<|start|>user<|message|>Why?<|end|>"
        "<|start|>assistant«<|channel|>final<|message|>So.<|return|>»",
    },
)

ALPACA = ChatTemplate(
    source=r"""
{%- for m in messages %}
{%- if m.role == 'system' %}
{{- m.content + '\n\n' }}
{%- elif m.role == 'user' %}
{{- '### Instruction:\n' + m.content + '\n\n' }}
{%- else %}
{{- '### Response:\n' + m.content + '\n' + eos_token + '\n\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### Response:\n' }}
{%- endif %}""",
    eos_token="</s>",
    controls=("</s>",),
    written={
        ONE_TURN: "Be kind.\n\n### Instruction:\nHi?\n\n### Response:\n«Yes.\n</s>»\n\n",
        TWO_TURNS: "### Instruction:\nHi?\n\n### Response:\n«Yes.\n</s>»\n\n"
        "### Instruction:\nWhy?\n\n### Response:\n«So.\n</s>»\n\n",
    },
)

# A thought is written for the last answer alone, and a server that wants none gets an empty one.
GLM = ChatTemplate(
    source=r"""
{{- '[gMASK]<sop>' }}
{%- for m in messages %}
{{- '<|' + m.role + '|>\n' }}
{%- if m.role == 'assistant' and loop.last and not '</think>' in m.content %}
{{- '<think></think>\n' }}
{%- endif %}
{{- m.content }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think></think>\n' }}
{%- endif %}
{%- endif %}""",
    eos_token="<|endoftext|>",
    controls=("[gMASK]", "<sop>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"),
    words=("<think>", "</think>"),
)
# The same with an end, as an operator would mend it.
GLM_MENDED = ChatTemplate(
    source=GLM.source.replace(
        "{{- m.content }}", "{{- m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    ),
    eos_token=GLM.eos_token,
    controls=GLM.controls,
    words=GLM.words,
    written={
        ONE_TURN: "[gMASK]<sop><|system|>\nBe kind.<|user|>\nHi?<|assistant|>\n<think></think>\n«Yes.<|endoftext|>»",
        TWO_TURNS: "[gMASK]<sop><|user|>\nHi?<|assistant|>\nYes.<|endoftext|>"
        "<|user|>\nWhy?<|assistant|>\n<think></think>\n«So.<|endoftext|>»",
    },
)

TRAINABLE = {
    "ChatML": CHATML,
    "Llama 3": LLAMA_3,
    "Gemma 3": GEMMA_3,
    "Phi-3.5": PHI_3_5,
    "Mistral": MISTRAL,
    "Qwen3": QWEN_3,
    "Qwen3, always thinking": QWEN_3_THINKING,
    "gpt-oss": GPT_OSS,
    "GLM, mended": GLM_MENDED,
    "Alpaca": ALPACA,
}


def _changed(template: ChatTemplate, old: str, new: str, **tokens: tuple[str, ...]) -> ChatTemplate:
    assert old in template.source
    chosen = {"controls": template.controls, "words": template.words} | tokens
    return ChatTemplate(
        source=template.source.replace(old, new),
        eos_token=template.eos_token,
        bos_token=template.bos_token,
        **chosen,  # type: ignore[arg-type]
    )


# What is wrong with each, and the words that its operator reads.
UNTRAINABLE = {
    "GLM: the next role's header ends a turn": (GLM, r"writes no control token after an answer but ''"),
    "Alpaca without an end": (
        _changed(ALPACA, " + eos_token", ""),
        r"no control token after an answer but '\\n\\n\\n### Instruction",
    ),
    "an end that is not marked as special": (
        _changed(PHI_3_5, "'<|end|>\\n'", "'<|im_end|>\\n'", controls=("<|endoftext|>",), words=("<|im_end|>",)),
        r"no control token after an answer but '<\|im_end\|>",
    ),
    "the last turn alone has an end": (
        _changed(PHI_3_5, "<|end|>\\n", "\\n"),
        r"with the first token of the next turn alone \('<\|user\|>'\)",
    ),
    "no generation prompt": (
        _changed(CHATML, "add_generation_prompt", "false"),
        r"no answer after the prompt that it gives a server",
    ),
    "a generation prompt of another role": (
        _changed(CHATML, "{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>model\\n' }}"),
        r"no answer after the prompt that it gives a server",
    ),
    "it always thinks, and drops the thoughts that it is given": (
        _changed(
            _changed(CHATML, "m.content +", "m.content.split('</think>')[-1] +"),
            "assistant\\n' }}",
            "assistant\\n<think>\\n' }}",
        ),
        r"no answer after the prompt that it gives a server",
    ),
    "broken": (_changed(CHATML, "{%- endfor %}", ""), "refuses this conversation|broken"),
}
