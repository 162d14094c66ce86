r"""The extended Alpaca chat format of the model card: story ⇄ text, byte for byte.

    ### Instruction:⏎ {char}'s Persona: …⏎⏎ {user}'s Persona: …⏎⏎ Scenario: …⏎⏎ Play the role of {char}. … {user}.
    ⏎⏎ ### Input:⏎ {user}: …  ⏎⏎ ### Response: (length = medium)⏎ {char}: …  ⏎⏎ ### Input:⏎ …

Blocks are separated by one blank line. A prompt for generation ends with `{char}:` and no space, because the first
generated token carries it.

Safety: a line of a message that could be read as a block header (`### Input:` in any case and spacing) gets a backslash
in front, so that a user's text can never forge a character's turn. `parse_prompt` takes exactly one off again, so a line
that had backslashes before is not changed either.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from helpers.lengths import rank
from helpers.stories import Message, Pair, Story, StoryError, check_text

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

_BLOCK = r"#+[ \t]*(?:instruction|input|response)\b"
_MESSAGE_LINE = re.compile(rf"^(?=[ \t\\]*{_BLOCK})", re.I | re.M)
_FIELD_LINE = re.compile(rf"^(?=[ \t\\]*(?:{_BLOCK}|[^\n]*'s Persona:|Scenario:|Play the role of ))", re.I | re.M)


def _unescaper(escaper: re.Pattern) -> re.Pattern:
    return re.compile(escaper.pattern.replace(r"^(?=", r"^\\(?=", 1), escaper.flags)


def escape(text: str, pattern: re.Pattern = _MESSAGE_LINE) -> str:
    """Put a backslash before every line that could be taken for a block header."""
    return pattern.sub(lambda _: "\\", text)


def unescape(text: str, pattern: re.Pattern = _MESSAGE_LINE) -> str:
    """Inverse of `escape`."""
    return _unescaper(pattern).sub("", text)


@dataclass(frozen=True)
class Segment:
    """A piece of prompt text. `trained` says whether the loss is taken on it."""

    text: str
    trained: bool
    kind: Kind


def instruction(story: Story, closing: str = CLOSING) -> str:
    """The system block: personas, scenario and the closing sentence."""
    char, user = story.names
    persona = [escape(p, _FIELD_LINE) for p in story.personas]
    scenario = escape(story.scenario, _FIELD_LINE)
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


def generation_segments(story: Story, length: str | None = None, history: Lengths = None) -> list[Segment]:
    """Segments of a prompt that asks for the character's next reply; the last one ends with `{char}:`.

    `length` is the modifier of the reply to come, `history` those of the replies already given.
    """
    if story.messages and story.messages[-1].speaker == "character":
        raise ValueError("the last message is already the character's: use story.before_reply(i) or add a user message")
    return [*segments(story, history), Segment("\n\n" + response_header(story.names.character, length), False, "header")]


def generation_prompt(story: Story, length: str | None = None, history: Lengths = None) -> str:
    """Prompt text for the character's next reply, ending with `{char}:` and no space."""
    return "".join(s.text for s in generation_segments(story, length, history))


def stop_strings(story: Story) -> list[str]:
    """Text at which a reply is over: a new block, or a line in which the model begins to speak for the user."""
    return ["\n### Input:", "\n### Response:", "\n### Instruction:", f"\n{story.names.user}:"]


# ---------------------------------------------------------------------------------------------------- chat template

# The format as a Jinja chat template for transformers. `char` and `user` are the names; an assistant message may carry its
# modifier as `length`; `length` beside the messages is the one for the reply to come. The system message holds everything
# of the instruction block below its header. {% generation %} marks what is trained (return_assistant_tokens_mask).
CHAT_TEMPLATE = """\
{%- set char = char if char is defined else 'Character' -%}
{%- set user = user if user is defined else 'User' -%}
{{- bos_token if bos_token else '' -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- '### Instruction:\\n' + message['content'] -}}
{%- elif message['role'] == 'user' -%}
{{- '\\n\\n### Input:\\n' + user + ': ' + message['content'] -}}
{%- else -%}
{%- set modifier = ' (length = ' + message['length'] + ')' if message['length'] else '' -%}
{{- '\\n\\n### Response:' + modifier + '\\n' + char + ':' -}}
{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '\\n\\n### Response:' + (' (length = ' + length + ')' if length else '') + '\\n' + char + ':' -}}
{%- endif -%}"""


def chat_messages(story: Story, lengths: Lengths = None) -> list[dict[str, str]]:
    """The story as `messages` for CHAT_TEMPLATE (with char=, user= and length= as arguments), already escaped."""
    modifiers = iter(lengths or [None] * len(story.replies))
    messages = [{"role": "system", "content": instruction(story).removeprefix("### Instruction:\n")}]
    for m in story.messages:
        message = {"role": "user" if m.speaker == "user" else "assistant", "content": escape(m.text)}
        if m.speaker == "character" and (length := next(modifiers)):
            message["length"] = length
        messages.append(message)
    return messages


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
        personas = Pair(unescape(first, _FIELD_LINE), unescape(second, _FIELD_LINE))
        return Story(Pair(char, user), personas, unescape(scenario, _FIELD_LINE), ())
    except StoryError as error:
        raise ValueError(f"block 0: {error}") from None
