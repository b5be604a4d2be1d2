"""How well-known models write a conversation: templates of three kinds, and the text by hand.

The texts are the formats that the models' authors published; the templates are written for these
tests. `turn` is one of 2023 that writes one turn, `messages` one of today's, `jinja` a file's own.
"""

from typing import NamedTuple

from refollama.messages import Message

SYSTEM, U1, A1, U2 = (
    Message("system", "Be brief."),
    Message("user", "Hi!"),
    Message("assistant", "Hello."),
    Message("user", "How are you?"),
)
TALKS = {
    "one": (U1,),
    "two": (U1, A1, U2),
    "system": (SYSTEM, U1, A1, U2),
    "begun": (U1, A1),  # a history that ends with the assistant is the beginning of its answer
}


class Format(NamedTuple):
    turn: str
    messages: str
    jinja: str
    expected: dict[str, str]
    bos: str = "<s>"
    eos: str = "</s>"


CHATML = Format(
    turn="{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
    "{{ if .Prompt }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n{{ .Response }}<|im_end|>\n",
    messages="""
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}<|im_start|>{{ .Role }}
{{ .Content }}{{ if or (ne .Role "assistant") (not $last) }}<|im_end|>
{{ end }}
{{- if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}
{{- end }}""",
    jinja="""\
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content + '<|im_end|>' + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' -}}
{% endif %}""",
    expected={
        "one": "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n",
        "two": "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n",
        "system": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "begun": "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nHello.",
    },
)

LLAMA2 = Format(
    turn="{{ if not .First }}<s>{{ end }}[INST] "
    "{{ if .System }}<<SYS>>\n{{ .System }}\n<</SYS>>\n\n{{ end }}"
    "{{ .Prompt }} [/INST] {{ .Response }} </s>",
    messages="""
{{- range $i, $m := .Messages }}
{{- if eq .Role "user" }}
{{- $first := or (eq $i 0) (and (eq $i 1) (ne $.System "")) }}
{{- if not $first }}<s>{{ end }}[INST] {{ if and $first $.System }}<<SYS>>
{{ $.System }}
<</SYS>>

{{ end }}{{ .Content }} [/INST]{{ " " }}
{{- else if eq .Role "assistant" }}
{{- .Content }}{{ if gt (len (slice $.Messages $i)) 1 }} </s>{{ end }}
{{- end }}
{{- end }}""",
    jinja="""\
{% set ns = namespace(system='') %}
{% for m in messages %}
    {% if m.role == 'system' %}
        {% set ns.system = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' %}
    {% elif m.role == 'user' %}
        {{- bos_token + '[INST] ' + ns.system + m.content.strip() + ' [/INST] ' -}}
        {% set ns.system = '' %}
    {% else %}
        {{- m.content + ' ' + eos_token -}}
    {% endif %}
{% endfor %}""",
    expected={
        "one": "[INST] Hi! [/INST] ",
        "two": "[INST] Hi! [/INST] Hello. </s><s>[INST] How are you? [/INST] ",
        "system": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi! [/INST] Hello. </s>"
        "<s>[INST] How are you? [/INST] ",
        "begun": "[INST] Hi! [/INST] Hello.",
    },
)

LLAMA3 = Format(
    turn="{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}<|eot_id|>"
    "{{ end }}{{ if .Prompt }}<|start_header_id|>user<|end_header_id|>\n\n{{ .Prompt }}<|eot_id|>"
    "{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n{{ .Response }}<|eot_id|>",
    messages="""
{{- if .System }}<|start_header_id|>system<|end_header_id|>

{{ .System }}<|eot_id|>
{{- end }}
{{- range $i, $_ := .Messages }}
{{- if eq .Role "system" }}{{ continue }}{{ end }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if and $last (eq .Role "assistant") }}{{ break }}{{ end }}<|eot_id|>
{{- if $last }}<|start_header_id|>assistant<|end_header_id|>

{{ end }}
{{- end }}""",
    jinja="""\
{{- bos_token }}
{%- macro turn(role, text) -%}
<|start_header_id|>{{ role }}<|end_header_id|>

{{ text|trim }}<|eot_id|>
{%- endmacro -%}
{%- for m in messages %}{{ turn(m['role'], m['content']) }}{% endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    expected={
        "one": "<|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "two": "<|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "system": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "begun": "<|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.",
    },
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
)

MISTRAL = Format(
    turn="[INST] {{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }} [/INST]"
    "{{ .Response }}</s>",
    messages="""
{{- range $i, $_ := .Messages }}
{{- if eq .Role "user" }}[INST] {{ if and $.System (le $i 1) }}{{ $.System }}

{{ end }}{{ .Content }} [/INST]
{{- else if eq .Role "assistant" }}{{ .Content }}
{{- if gt (len (slice $.Messages $i)) 1 }}</s>{{ end }}
{{- end }}
{{- end }}""",
    jinja="""\
{{ bos_token }}
{%- if messages[0].role == 'system' -%}
    {%- set system, rest = messages[0].content ~ '\\n\\n', messages[1:] -%}
{%- else -%}
    {%- set system, rest = '', messages -%}
{%- endif -%}
{%- for m in rest -%}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('user and assistant must take turns') }}
    {%- endif -%}
    {%- if m.role == 'user' -%}
        [INST] {{ (system if loop.first else '') + m.content }} [/INST]
    {%- else -%}
        {{ m.content + eos_token }}
    {%- endif -%}
{%- endfor -%}""",
    expected={
        "one": "[INST] Hi! [/INST]",
        "two": "[INST] Hi! [/INST]Hello.</s>[INST] How are you? [/INST]",
        "system": "[INST] Be brief.\n\nHi! [/INST]Hello.</s>[INST] How are you? [/INST]",
        "begun": "[INST] Hi! [/INST]Hello.",
    },
)

ZEPHYR = Format(
    turn="{{ if .System }}<|system|>\n{{ .System }}</s>\n{{ end }}"
    "<|user|>\n{{ .Prompt }}</s>\n<|assistant|>\n{{ .Response }}</s>\n",
    messages="""
{{- range $i, $_ := .Messages }}<|{{ .Role }}|>
{{ .Content }}
{{- if or (ne .Role "assistant") (gt (len (slice $.Messages $i)) 1) }}</s>
{{ end }}
{{- end }}
{{- with index .Messages (slice .Messages 1 | len) }}
{{- if ne .Role "assistant" }}<|assistant|>
{{ end }}
{{- end }}""",
    jinja="""\
{% for message in messages %}
{{ '<|' ~ message['role'] ~ '|>\\n' ~ message['content'] ~ eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    expected={
        "one": "<|user|>\nHi!</s>\n<|assistant|>\n",
        "two": "<|user|>\nHi!</s>\n<|assistant|>\nHello.</s>\n"
        "<|user|>\nHow are you?</s>\n<|assistant|>\n",
        "system": "<|system|>\nBe brief.</s>\n<|user|>\nHi!</s>\n<|assistant|>\nHello.</s>\n"
        "<|user|>\nHow are you?</s>\n<|assistant|>\n",
        "begun": "<|user|>\nHi!</s>\n<|assistant|>\nHello.",
    },
)

ALPACA = Format(
    turn="{{ if .System }}{{ .System }}\n\n{{ end }}"
    "{{ if .Prompt }}### Instruction:\n{{ .Prompt }}\n\n{{ end }}"
    "### Response:\n{{ .Response }}\n\n",
    messages="""
{{- if .System }}{{ .System }}

{{ end }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}### Instruction:
{{ .Content }}

### Response:
{{ else if eq .Role "assistant" }}{{ .Content }}{{ if not $last }}

{{ end }}
{{- end }}
{{- end }}""",
    jinja="""\
{% for m in messages %}
    {%- if m.role == 'user' -%}
        {{ '### Instruction:\\n' + m.content + '\\n\\n### Response:\\n' }}
    {%- else -%}
        {{ m.content + '\\n\\n' }}
    {%- endif -%}
{% endfor %}""",
    expected={
        "one": "### Instruction:\nHi!\n\n### Response:\n",
        "two": "### Instruction:\nHi!\n\n### Response:\nHello.\n\n"
        "### Instruction:\nHow are you?\n\n### Response:\n",
        "system": "Be brief.\n\n### Instruction:\nHi!\n\n### Response:\nHello.\n\n"
        "### Instruction:\nHow are you?\n\n### Response:\n",
        "begun": "### Instruction:\nHi!\n\n### Response:\nHello.",
    },
)

FORMATS = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "alpaca": ALPACA,
}
