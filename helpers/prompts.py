r"""The extended Alpaca chat format of the model card: story ⇄ text, byte for byte.

    ### Instruction:⏎ {char}'s Persona: …⏎⏎ {user}'s Persona: …⏎⏎ Scenario: …⏎⏎ Play the role of {char}. … {user}.
    ⏎⏎ ### Input:⏎ {user}: …  ⏎⏎ ### Response: (length = medium)⏎ {char}: …  ⏎⏎ ### Input:⏎ …

Blocks are separated by one blank line. A prompt for generation ends with `{char}:` and no space, because the first
generated token carries it.

Safety: a line of a message that could be read as a block header (`### Input:` in any case, spacing and number of #) gets a
backslash in front, so that a user's text can never forge a character's turn. `parse_prompt` takes exactly one off again, so a
line that had backslashes before is not changed either. Headers in look-alike characters, and names that read like a header,
are refused when a Story is made (helpers/schema.py). The chat template puts the same backslashes into the messages that it is
given, but cannot refuse: it lets look-alikes through (Jinja knows no Unicode normalisation), and names as they are. Whoever
serves strangers checks those first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from helpers.lengths import LENGTHS, rank
from helpers.schema import BLANKS, Message, Pair, Story, StoryError, check_text, is_header

Kind = Literal["instruction", "input", "header", "reply"]
Lengths = Sequence[str | None] | None

# The card's closing sentence. The format author's own cards leave out the clause "Taking the above … consideration,".
CLOSING = (
    "Play the role of {char}. Taking the above information into consideration, you must engage in a roleplaying chat "
    "with {user} below this line. Do not write dialogues and narration for {user}."
)
CLOSING_SHORT = (
    "Play the role of {char}. You must engage in a roleplaying chat with {user} below this line. "
    "Do not write dialogues and narration for {user}."
)


def _is_field(line: str) -> bool:
    """Could this line of a persona or scenario pass for a field of the instruction block, or for a header?"""
    bare = line.lstrip(BLANKS + "\\").lower()
    return is_header(line) or bare.startswith(("scenario:", "play the role of ")) or "'s persona:" in bare


def escape(text: str, fields: bool = False) -> str:
    """Put a backslash before every line that could be taken for a block header (or a field, in personas and scenarios)."""
    if not fields and "#" not in text:
        return text
    marked = _is_field if fields else is_header
    return "\n".join("\\" + line if marked(line) else line for line in text.split("\n"))


def unescape(text: str, fields: bool = False) -> str:
    """Inverse of `escape`."""
    marked = _is_field if fields else is_header
    return "\n".join(line[1:] if line[:1] == "\\" and marked(line) else line for line in text.split("\n"))


@dataclass(frozen=True)
class Segment:
    """A piece of prompt text. `trained` says whether the loss is taken on it."""

    text: str
    trained: bool
    kind: Kind


def instruction(story: Story, closing: str = CLOSING) -> str:
    """The system block: personas, scenario and the closing sentence."""
    char, user = story.names
    persona = [escape(p, fields=True) for p in story.personas]
    scenario = escape(story.scenario, fields=True)
    return (
        f"### Instruction:\n{char}'s Persona: {persona[0]}\n\n{user}'s Persona: {persona[1]}\n\nScenario: {scenario}\n\n"
        + closing.format(char=char, user=user)
    )


def response_header(char: str, length: str | None = None) -> str:
    """`### Response: (length = medium)⏎{char}:` — no trailing space."""
    if length is not None:
        rank(length)  # refuses anything but the ten names
    return f"### Response:{f' (length = {length})' if length else ''}\n{char}:"


def segments(story: Story, lengths: Lengths = None, closing: str = CLOSING) -> list[Segment]:
    """The story as consecutive pieces of text; joined they are `format_story(story, lengths)`.

    `lengths` has one entry per character reply, None for a reply without modifier; None for no modifiers at all.
    Only the character's replies are `trained`, each with the space after its colon.
    """
    replies = story.replies
    if lengths is None:
        lengths = [None] * len(replies)
    if len(lengths) != len(replies):
        raise ValueError(f"{len(lengths)} lengths for {len(replies)} character replies: give one for each, or None")
    pieces = [Segment(instruction(story, closing), False, "instruction")]
    upcoming = iter(lengths)
    for m in story.messages:
        name = story.name_of(m.speaker)
        if m.speaker == "user":
            pieces.append(Segment(f"\n\n### Input:\n{name}: {escape(m.text)}", False, "input"))
        else:
            pieces.append(Segment("\n\n" + response_header(name, next(upcoming)), False, "header"))
            pieces.append(Segment(" " + escape(m.text), True, "reply"))
    return pieces


def format_story(story: Story, lengths: Lengths = None, closing: str = CLOSING) -> str:
    """The whole story as prompt text."""
    return "".join(s.text for s in segments(story, lengths, closing))


def generation_segments(
    story: Story, length: str | None = None, history: Lengths = None, closing: str = CLOSING
) -> list[Segment]:
    """Segments of a prompt that asks for the character's next reply; the last one ends with `{char}:`.

    `length` is the modifier of the reply to come, `history` those of the replies already given.
    """
    if story.messages and story.messages[-1].speaker == "character":
        raise ValueError("the last message is already the character's: use story.before_reply(i) or add a user message")
    return [*segments(story, history, closing), Segment("\n\n" + response_header(story.names.character, length), False, "header")]


def generation_prompt(story: Story, length: str | None = None, history: Lengths = None, closing: str = CLOSING) -> str:
    """Prompt text for the character's next reply, ending with `{char}:` and no space."""
    return "".join(s.text for s in generation_segments(story, length, history, closing))


def stop_strings(story: Story) -> list[str]:
    """Text at which a reply is over: a new block, or a line in which the model begins to speak for the user."""
    return stop_strings_of(story.names.user)


def stop_strings_of(user: str) -> list[str]:
    """`stop_strings` for a user's name."""
    return ["\n### Input:", "\n### Response:", "\n### Instruction:", f"\n{user}:"]


# ---------------------------------------------------------------------------------------------------- chat template

# Arguments beside the messages: `char` and `user` are the names, `length` the modifier of the reply to come. The instruction
# block comes from a system message (everything below its header), or from `persona`, `user_persona` and `scenario`. An assistant
# message may carry its own modifier as `length`. {% generation %} marks what is trained (return_assistant_tokens_mask).
# `safe` is `escape` in Jinja; a system message may be escaped already, so there only bare headers get their backslash.
_TEMPLATE = r"""
{%- set char = char if char is defined and char else 'Character' -%}
{%- set user = user if user is defined and user else 'User' -%}
{%- set length = length if length is defined else none -%}
{%- set bos_token = bos_token if bos_token is defined else '' -%}
{%- set blanks = '@BLANKS@' -%}
{%- set letters = 'abcdefghijklmnopqrstuvwxyz0123456789_' -%}
{%- macro safe(text, fields, escaped) -%}
{%- for token in [bos_token, eos_token] -%}
{%- if token and token in text -%}{{- raise_exception('a text contains the special token ' + token) -}}{%- endif -%}
{%- endfor -%}
{%- for line in text.split('\n') -%}
{%- set bare = line.lstrip(blanks + ('' if escaped else '\\')) -%}
{%- set rest = bare.lstrip('#').lstrip(blanks).lower() -%}
{%- set found = namespace(mark=false) -%}
{%- if bare[:1] == '#' -%}
{%- for word, end in [('instruction', 11), ('input', 5), ('response', 8)] -%}
{%- set after = rest[end:end + 1] -%}
{%- if rest.startswith(word) and (not after or after not in letters) -%}{%- set found.mark = true -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if fields -%}
{%- set low = bare.lower() -%}
{%- if low.startswith('scenario:') or low.startswith('play the role of ') or "'s persona:" in low -%}
{%- set found.mark = true -%}
{%- endif -%}
{%- endif -%}
{{- ('' if loop.first else '\n') + ('\\' if found.mark else '') + line -}}
{%- endfor -%}
{%- endmacro -%}
{%- macro header(wanted) -%}
{%- if wanted and wanted not in [@LENGTHS@] -%}
{{- raise_exception('unknown length ' + wanted + ': use one of @NAMES@, or none') -}}
{%- endif -%}
{{- '\n\n### Response:' + (' (length = ' + wanted + ')' if wanted else '') + '\n' + char + ':' -}}
{%- endmacro -%}
{%- for name in [char, user] -%}
{%- if '\n' in name or ':' in name or safe(name, false, false) != name -%}
{{- raise_exception('a name has no colon and no line break, and is not a block header: ' + name) -}}
{%- endif -%}
{%- endfor -%}
{{- bos_token if bos_token else '' -}}
{%- set whole = scenario is defined and scenario -%}
{%- if whole -%}
{%- if not (persona is defined and persona and user_persona is defined and user_persona) -%}
{{- raise_exception('beside scenario, persona and user_persona are needed') -}}
{%- endif -%}
{{- '### Instruction:\n' + char + "'s Persona: " + safe(persona | trim, true, false) + '\n\n' -}}
{{- user + "'s Persona: " + safe(user_persona | trim, true, false) + '\n\nScenario: ' -}}
{{- safe(scenario | trim, true, false) + '\n\n@CLOSING@' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['content'] is not string -%}{{- raise_exception('the content of a message must be a string') -}}{%- endif -%}
{%- if message['role'] == 'system' -%}
{%- if whole or not loop.first -%}
{{- raise_exception('a system message can only be the first message, and not stand beside scenario') -}}
{%- endif -%}
{{- '### Instruction:\n' + safe(message['content'] | trim, false, true) -}}
{%- elif message['role'] == 'user' -%}
{{- '\n\n### Input:\n' + user + ': ' + safe(message['content'] | trim, false, false) -}}
{%- elif message['role'] == 'assistant' -%}
{{- header(message['length'] if 'length' in message else none) -}}
{%- generation -%}{{- ' ' + safe(message['content'] | trim, false, false) + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- raise_exception('unknown role ' + message['role'] + ': use system, user or assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- header(length) -}}{%- endif -%}
"""


def chat_template(closing: str = CLOSING) -> str:
    """The format as a Jinja chat template for transformers, byte-identical to `generation_prompt`."""
    closing = closing.replace("\\", "\\\\").replace("'", "\\'")
    said = closing.replace("{char}", "' + char + '").replace("{user}", "' + user + '")
    values = {
        "@BLANKS@": BLANKS.encode("unicode_escape").decode(),
        "@LENGTHS@": ", ".join(f"'{name}'" for name in LENGTHS),
        "@NAMES@": ", ".join(LENGTHS),
        "@CLOSING@": said,
    }
    return re.sub("@[A-Z]+@", lambda key: values[key[0]], _TEMPLATE.strip())


CHAT_TEMPLATE = chat_template()


def chat_messages(story: Story, lengths: Lengths = None, system: bool = True, closing: str = CLOSING) -> list[dict[str, Any]]:
    """The story as `messages` for the chat template, in plain text; `chat_arguments` gives what stands beside them.

    With `system=False` the instruction block is left to the template (`chat_arguments(story, setting=True)`).
    """
    replies = len(story.replies)
    modifiers = iter([None] * replies if lengths is None else lengths)
    head = instruction(story, closing).removeprefix("### Instruction:\n")
    messages: list[dict[str, Any]] = [{"role": "system", "content": head}] if system else []
    for m in story.messages:
        message = {"role": "user" if m.speaker == "user" else "assistant", "content": m.text}
        if m.speaker == "character" and (length := next(modifiers)):
            message["length"] = length
        messages.append(message)
    return messages


def chat_arguments(story: Story, setting: bool = False) -> dict[str, str]:
    """Names, and with `setting` also personas and scenario, as keyword arguments for `apply_chat_template`."""
    arguments = {"char": story.names.character, "user": story.names.user}
    if setting:
        persona = {"persona": story.personas.character, "user_persona": story.personas.user}
        arguments |= persona | {"scenario": story.scenario}
    return arguments


# ---------------------------------------------------------------------------------------------------------- parsing

_SPLIT = re.compile(r"\n\n(?=### (?:Input:\n|Response:(?: \(length = \w+\))?\n))")
_RESPONSE = re.compile(r"### Response:(?: \(length = (\w+)\))?\n(.*)", re.S)


def parse_prompt(text: str) -> tuple[Story, list[str | None]]:
    """Story and lengths from prompt text: the inverse of `format_story`, whichever closing sentence was used.

    Raises ValueError, with the block's number, for text that is not in this format.
    """
    head, *blocks = _SPLIT.split(text)
    setting = _parse_instruction(head)
    messages: list[Message] = []
    lengths: list[str | None] = []
    for number, block in enumerate(blocks, start=1):
        if match := _RESPONSE.fullmatch(block):
            lengths.append(match[1])
            if match[1]:
                try:
                    rank(match[1])
                except ValueError as error:
                    raise ValueError(f"block {number}: {error}") from None
            speaker, body = "character", match[2]
        else:
            speaker, body = "user", block.removeprefix("### Input:\n")
        start = f"{setting.name_of(speaker)}: "
        if not body.startswith(start):
            raise ValueError(f"block {number}: expected a line that begins with {start!r}")
        said = unescape(body.removeprefix(start))
        check_text(said, f"block {number}")
        messages.append(Message(speaker, said))
    return Story(setting.names, setting.personas, setting.scenario, tuple(messages)), lengths


def _parse_instruction(head: str) -> Story:
    """The story without messages. Names hold no colon and no backslash, so no line of a text can pass for a field."""
    body, _, closing = head.rpartition("\n\n")
    begin = re.match(r"### Instruction:\n([^\n:]+)'s Persona: ", body)
    if not begin:
        raise ValueError("block 0: it does not begin with '### Instruction:' and a line \"…'s Persona: …\"")
    char = begin[1]
    for template in (CLOSING, CLOSING_SHORT):
        before, between, after = (re.escape(part.format(char=char)) for part in template.split("{user}"))
        if match := re.fullmatch(rf"{before}([^\n:]+){between}\1{after}", closing):
            break
    else:
        raise ValueError(f"block 0: the last paragraph is not the closing sentence for {char!r}")
    user = match[1]
    first, found, rest = body[begin.end() :].partition(f"\n\n{user}'s Persona: ")
    second, found_too, scenario = rest.partition("\n\nScenario: ")
    if not (found and found_too):
        raise ValueError(f"block 0: no persona of {user!r} or no scenario after it")
    try:
        personas = Pair(unescape(first, fields=True), unescape(second, fields=True))
        return Story(Pair(char, user), personas, unescape(scenario, fields=True), ())
    except StoryError as error:
        raise ValueError(f"block 0: {error}") from None
