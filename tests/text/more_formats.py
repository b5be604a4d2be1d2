"""How sixteen more models write a conversation: templates for Go, and the same in plain Python.

`turn` is a template of 2023 that writes one turn, `messages` one of today's. `judge` writes the
text that the model's authors published, from the system text and the turns; the templates are
written for these tests.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from refollama.messages import Message
from tests.text.chat_formats import SYSTEM, TALKS, U1

MORE_TALKS = {**TALKS, "system one": (SYSTEM, U1)}


class Turn(NamedTuple):
    user: str
    answer: str | None
    closed: bool  # is the answer complete?


Judge = Callable[[str, Sequence[Turn]], str]


class Form(NamedTuple):
    judge: Judge
    turn: str = ""
    messages: str = ""


def expected(form: Form, talk: Sequence[Message]) -> str:
    """The text of a conversation, as the model's authors write it."""
    system = "".join(m.content for m in talk if m.role == "system")
    said = [m.content for m in talk if m.role != "system"]
    pairs = [said[at : at + 2] for at in range(0, len(said), 2)]
    last = len(pairs) - 1
    turns = [
        Turn(pair[0], pair[1] if len(pair) > 1 else None, at < last)
        for at, pair in enumerate(pairs)
    ]
    return form.judge(system, turns)


def told(turn: Turn, before: str, behind: str) -> str:
    """What stands behind the place where the answer begins."""
    if turn.answer is None:
        return ""
    return before + turn.answer + (behind if turn.closed else "")


# ── lines that begin with a word ──────────────────────────────────────────────────────────────


def vicuna(system: str, turns: Sequence[Turn]) -> str:
    text = system and f"{system} "
    for turn in turns:
        text += f"USER: {turn.user} ASSISTANT:" + told(turn, " ", "</s>")
    return text


def falcon(system: str, turns: Sequence[Turn]) -> str:
    lines = [f"System: {system}\n"] if system else []
    lines += [f"User: {turn.user}\nFalcon:" + told(turn, " ", "\n") for turn in turns]
    return "".join(lines)


def chatqa(system: str, turns: Sequence[Turn]) -> str:
    blocks = [f"System: {system}"] if system else []
    for turn in turns:
        blocks += [f"User: {turn.user}", "Assistant:" + told(turn, " ", "")]
    return "\n\n".join(blocks)


def deepseek_llm(system: str, turns: Sequence[Turn]) -> str:
    text = system and system + "\n\n"
    for turn in turns:
        text += f"User: {turn.user}\n\nAssistant:" + told(turn, " ", "<｜end▁of▁sentence｜>")
    return text


def openchat(system: str, turns: Sequence[Turn]) -> str:
    said = [("System", system)] if system else []
    for turn in turns:
        said += [("User", turn.user), ("Assistant", turn.answer or "")]
    lines = [f"GPT4 Correct {who}: {what}" for who, what in said]
    return "<|end_of_turn|>".join(lines).removesuffix(" " if turns[-1].answer is None else "\0")


# ── headings ──────────────────────────────────────────────────────────────────────────────────


def headings(user: str, assistant: str, system: str = "", end: str = "\n\n") -> Judge:
    """Each message below a heading; the system text stands alone where it has none."""

    def judge(text: str, turns: Sequence[Turn]) -> str:
        written = system + text + "\n\n" if text else ""
        for turn in turns:
            written += user + turn.user + "\n\n" + assistant + told(turn, "", end)
        return written

    return judge


def deepseek_coder(system: str, turns: Sequence[Turn]) -> str:
    lines = [system] if system else []
    for turn in turns:
        lines += ["### Instruction:", turn.user, "### Response:", told(turn, "", "\n<|EOT|>")]
    return "\n".join(lines)


# ── tokens around each message ────────────────────────────────────────────────────────────────


def around(begin: str, roles: Sequence[str], end: str, between: str = "") -> Judge:
    """`begin`, where {} is the role's name; the message; `end`."""
    of_system, of_user, of_assistant = (begin.format(role) for role in roles)

    def judge(system: str, turns: Sequence[Turn]) -> str:
        text = of_system + system + end + between if system else ""
        for turn in turns:
            text += of_user + turn.user + end + between + of_assistant
            text += told(turn, "", end + between)
        return text

    return judge


def gemma(system: str, turns: Sequence[Turn]) -> str:
    """There is no role for a system text: it stands in the first message of the user."""
    first, *rest = turns
    first = first._replace(user=f"{system}\n\n{first.user}" if system else first.user)
    write = around("<start_of_turn>{}\n", ("", "user", "model"), "<end_of_turn>", "\n")
    return write("", [first, *rest])


def codellama_70b(system: str, turns: Sequence[Turn]) -> str:
    """Only the answer that is to come says whom it is for."""
    steps = [f"Source: system\n\n {system} <step> "] if system else []
    for turn in turns:
        steps.append(f"Source: user\n\n {turn.user} <step> ")
        steps.append("Source: assistant\n" + ("" if turn.closed else "Destination: user\n") + "\n ")
        steps.append(told(turn, "", " <step> "))
    return "".join(steps)


MORE_FORMATS = {
    "vicuna": Form(
        vicuna,
        "{{ if .System }}{{ .System }} {{ end }}{{ if .Prompt }}USER: {{ .Prompt }} {{ end }}"
        "ASSISTANT:{{ if .Response }} {{ .Response }}</s>{{ end }}",
        """
{{- with .System }}{{ . }} {{ end }}
{{- range $i, $m := .Messages }}
{{- if eq $m.Role "user" }}USER: {{ $m.Content }} ASSISTANT:
{{- else if eq $m.Role "assistant" }} {{ $m.Content }}
{{- if lt $i (slice $.Messages 1 | len) }}</s>{{ end }}
{{- end }}
{{- end }}""",
    ),
    "falcon-instruct": Form(
        falcon,
        """{{ if .System }}System: {{ .System }}
{{ end }}{{ if .Prompt }}User: {{ .Prompt }}
{{ end }}Falcon:{{ if .Response }} {{ .Response }}
{{ end }}""",
    ),
    "chatqa": Form(
        chatqa,
        """
{{- with .System }}System: {{ . }}

{{ end }}
{{- with .Prompt }}User: {{ . }}

{{ end -}}
Assistant:{{ if .Response }} {{ .Response }}

{{ end }}""",
    ),
    "deepseek-llm": Form(
        deepseek_llm,
        '{{ with .System }}{{ printf "%s\\n\\n" . }}{{ end }}'
        '{{ with .Prompt }}{{ print "User: " . "\\n\\n" }}{{ end }}'
        "Assistant:{{ if .Response }} {{ .Response }}<｜end▁of▁sentence｜>{{ end }}",
    ),
    "openchat": Form(
        openchat,
        "{{ if .System }}GPT4 Correct System: {{ .System }}<|end_of_turn|>{{ end }}"
        "{{ if .Prompt }}GPT4 Correct User: {{ .Prompt }}<|end_of_turn|>{{ end }}"
        "GPT4 Correct Assistant:{{ if .Response }} {{ .Response }}<|end_of_turn|>{{ end }}",
        """
{{- define "say" }}GPT4 Correct {{ . }}:{{ end }}
{{- range $i, $_ := .Messages }}
{{- $open := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "system" }}{{ template "say" "System" }}
{{- else if eq .Role "user" }}{{ template "say" "User" }}
{{- else }}{{ template "say" "Assistant" }}
{{- end }} {{ .Content }}
{{- if not (and $open (eq .Role "assistant")) }}<|end_of_turn|>{{ end }}
{{- if and $open (eq .Role "user") }}{{ template "say" "Assistant" }}{{ end }}
{{- end }}""",
    ),
    "granite-instruct": Form(
        headings("Question:\n", "Answer:\n", "System:\n"),
        """{{ if .System }}System:
{{ .System }}

{{ end }}{{ if .Prompt }}Question:
{{ .Prompt }}

{{ end }}Answer:
{{ .Response }}

""",
    ),
    "magicoder": Form(
        headings("@@ Instruction\n", "@@ Response\n"),
        """
{{- if .System }}
{{- .System }}

{{ end }}
{{- if .Prompt }}@@ Instruction
{{ .Prompt }}

{{ end -}}
@@ Response
{{ .Response }}

""",
        """
{{- range $at, $message := .Messages }}
{{- $more := gt (len (slice $.Messages $at)) 1 }}
{{- if eq .Role "user" }}@@ Instruction
{{ .Content }}

@@ Response
{{ else }}{{ .Content }}{{ if $more }}

{{ end }}
{{- end }}
{{- end }}""",
    ),
    "solar-instruct": Form(
        headings("### User:\n", "### Assistant:\n", "### System:\n"),
        """{{ with .System }}### System:
{{ . }}

{{ end }}{{ with .Prompt }}### User:
{{ . }}

{{ end }}### Assistant:
{{ .Response }}

""",
        """
{{- /* the heading of each role */ -}}
{{- range .Messages }}
{{- if eq .Role "system" }}### System:
{{ .Content }}

{{ else if eq .Role "user" }}### User:
{{ .Content }}

### Assistant:
{{ else }}{{ .Content }}
{{- if ne (len $.Messages) 2 }}

{{ end }}
{{- end }}
{{- end }}""",
    ),
    "orca-mini": Form(
        headings("### User:\n", "### Response:\n", "### System:\n"),
        """{{- if ne .System "" -}}
### System:
{{ .System }}

{{ end }}
{{- if ne .Prompt "" -}}
### User:
{{ .Prompt }}

{{ end -}}
### Response:
{{ .Response }}

""",
    ),
    "starcoder2-instruct": Form(
        headings("### Instruction\n", "### Response\n", end="<|endoftext|>"),
        """{{ if .System }}{{ .System }}

{{ end }}{{ if .Prompt }}### Instruction
{{ .Prompt }}

{{ end }}### Response
{{ .Response }}<|endoftext|>""",
    ),
    "deepseek-coder": Form(
        deepseek_coder,
        """{{ if .System }}{{ .System }}
{{ end }}{{ if .Prompt }}### Instruction:
{{ .Prompt }}
{{ end }}### Response:
{{ if .Response }}{{ .Response }}
<|EOT|>
{{ end }}""",
        """
{{- $last := slice .Messages 1 | len }}
{{- range $i, $m := .Messages }}
{{- if eq $m.Role "system" }}{{ $m.Content }}
{{ else if eq $m.Role "user" }}### Instruction:
{{ $m.Content }}
### Response:
{{ else }}{{ $m.Content }}{{ if ne $i $last }}
<|EOT|>
{{ end }}
{{- end }}
{{- end }}""",
    ),
    "phi-3": Form(
        around("<|{}|>\n", ("system", "user", "assistant"), "<|end|>", "\n"),
        """{{ if .System }}<|system|>
{{ .System }}<|end|>
{{ end }}{{ if .Prompt }}<|user|>
{{ .Prompt }}<|end|>
{{ end }}<|assistant|>
{{ .Response }}<|end|>
""",
        """
{{- range $i, $m := .Messages }}<|{{ .Role }}|>
{{ .Content }}
{{- if and (eq .Role "assistant") (eq (len (slice $.Messages $i)) 1) }}{{ break }}{{ end }}<|end|>
{{ if eq (len (slice $.Messages $i)) 1 }}<|assistant|>
{{ end }}
{{- end }}""",
    ),
    "alfred": Form(
        around("<start_{}>", ("system", "user", "assistant"), "<end_message>"),
        "{{ if .System }}<start_system>{{ .System }}<end_message>{{ end }}{{ if .Prompt }}"
        "<start_user>{{ .Prompt }}<end_message>{{ end }}<start_assistant>{{ .Response }}"
        "<end_message>",
    ),
    "command-r": Form(
        around(
            "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>",
            ("SYSTEM", "USER", "CHATBOT"),
            "<|END_OF_TURN_TOKEN|>",
        ),
        "{{ if .System }}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{ .System }}"
        "<|END_OF_TURN_TOKEN|>{{ end }}"
        "{{ if .Prompt }}<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{ .Prompt }}<|END_OF_TURN_TOKEN|>"
        "{{ end }}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{{ .Response }}<|END_OF_TURN_TOKEN|>",
        """
{{- define "open" }}<|START_OF_TURN_TOKEN|><|{{ . }}_TOKEN|>{{ end }}
{{- $said := false }}
{{- range $i, $_ := .Messages }}
{{- $said = eq .Role "assistant" }}
{{- if $said }}{{ template "open" "CHATBOT" }}
{{- else if eq .Role "user" }}{{ template "open" "USER" }}
{{- else }}{{ template "open" "SYSTEM" }}
{{- end }}{{ .Content }}
{{- if not (and $said (eq (len (slice $.Messages $i)) 1)) }}<|END_OF_TURN_TOKEN|>{{ end }}
{{- end }}
{{- if not $said }}{{ template "open" "CHATBOT" }}{{ end }}""",
    ),
    "gemma-instruct": Form(
        gemma,
        """<start_of_turn>user
{{ if .System }}{{ .System }}

{{ end }}{{ .Prompt }}<end_of_turn>
<start_of_turn>model
{{ .Response }}<end_of_turn>
""",
        """
{{- $system := "" }}
{{- range $i, $_ := .Messages }}
{{- if eq .Role "system" }}{{ $system = print .Content "\\n\\n" }}{{ continue }}{{ end }}
{{- if eq .Role "user" }}<start_of_turn>user
{{ $system }}{{ .Content }}<end_of_turn>
<start_of_turn>model
{{ $system = "" }}
{{- else }}{{ .Content }}
{{- if gt (len (slice $.Messages $i)) 1 }}<end_of_turn>
{{ end }}
{{- end }}
{{- end }}""",
    ),
    "codellama-70b-instruct": Form(
        codellama_70b,
        messages="""
{{- range $i, $m := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}Source: {{ $m.Role }}
{{ if and $last (eq $m.Role "assistant") }}Destination: user

 {{ $m.Content }}{{ break }}{{ end }}
 {{ $m.Content }} <step> {{ if $last }}Source: assistant
Destination: user

 {{ end }}
{{- end }}""",
    ),
}
