"""Widgets of notebook 5: read replies by length, and chat. Thin shells over `reply_page` and `chat.Chat`."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets

from helpers.chat import Chat
from helpers.generation import Sampling
from helpers.lengths import LENGTHS, word_range
from helpers.stories import Story
from helpers.widgets import NO_MODIFIER, Panel, _live

# --------------------------------------------------------------------------------------------------- reply explorer


def reply_page(conversation: Mapping[str, Any], length: str | None, width: int = 100) -> str:
    """What was said, and all recorded replies to it at one length, with their words and the class's own range."""
    char, user = conversation["names"]
    chosen = [r for r in conversation["replies"] if r["condition"] == length]
    lines = textwrap.wrap(conversation["persona"], width) + textwrap.wrap(conversation["scenario"], width)
    lines += ["", f"{user}:", *textwrap.wrap(conversation["said"], width, initial_indent="    ", subsequent_indent="    ")]
    asked = "no modifier"
    if length:
        low, high = word_range(length)
        asked = f"length = {length}, {low} to {high} words" if high else f"length = {length}, {low} words or more"
    for r in chosen:
        cut = ", cut off" if r["end"] == "limit" else ""
        lines += ["", f"{char} ({asked}; got {r['words']}{cut}):"]
        for paragraph in r["text"].split("\n"):
            lines += textwrap.wrap(paragraph, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) if chosen else f"no reply to this was recorded with {asked}"


def reply_explorer(conversations: Sequence[Mapping[str, Any]]) -> Panel:
    """Choose a conversation and a length, read the replies."""
    titles = [(f"{i + 1}. {' and '.join(c['names'])}", i) for i, c in enumerate(conversations)]
    which = ipywidgets.Dropdown(options=titles, description="prompt")
    length = ipywidgets.SelectionSlider(options=[*LENGTHS, NO_MODIFIER], value="medium", description="length")

    def render() -> str:
        return reply_page(conversations[which.value], None if length.value == NO_MODIFIER else length.value)

    return _live((which, length), render, (ipywidgets.HBox([which, length]),))


# ------------------------------------------------------------------------------------------------------------- chat


def chat_panel(model, tokenizer, stories: Sequence[Story], sampling: Sampling | None = None) -> Panel:
    """Pick a character, talk, change the length whenever you like; the reply appears as it is made."""
    chats = [Chat(model, tokenizer, s, sampling) for s in stories]
    titles = [(f"{s.names.character} (you are {s.names.user})", i) for i, s in enumerate(stories)]
    who = ipywidgets.Dropdown(options=titles, description="talk to")
    length = ipywidgets.Dropdown(options=[NO_MODIFIER, *LENGTHS], value="medium", description="length")
    said = ipywidgets.Textarea(placeholder="say something", rows=2)
    send, again = ipywidgets.Button(description="say it"), ipywidgets.Button(description="another reply")
    box = ipywidgets.HTML()

    def show(*below: str) -> None:
        chat = chats[who.value]
        text = "\n".join([chat.introduction(), "", chat.transcript(), *below])
        style = "white-space:pre-wrap;line-height:1.35;max-height:32em;overflow-y:auto;margin:0;padding:.6em"
        box.value = f'<pre style="{style}">{html.escape(text)}</pre>'

    def stream(pieces_of, said_now: Sequence[str] = ()) -> None:
        send.disabled = again.disabled = True
        try:
            char, text = chats[who.value].story.names.character, ""
            for piece in pieces_of():  # the chat keeps both messages when the reply has ended; until then they are shown here
                text += piece
                show(*said_now, f"{char}:", f"    {text}")
            said.value = ""
            show()
        except ValueError as error:  # the format's own sentences: an empty text, a header in it
            show(f"[{error}]")
        finally:
            send.disabled = again.disabled = False

    def say(_) -> None:
        chat = chats[who.value]
        stream(lambda: chat.say(said.value, chosen()), (f"{chat.story.names.user}:", f"    {said.value}"))

    chosen = lambda: None if length.value == NO_MODIFIER else length.value  # noqa: E731
    send.on_click(say)
    again.on_click(lambda _: stream(lambda: chats[who.value].again()))
    who.observe(lambda _: show(), names="value")
    show()
    return Panel([ipywidgets.HBox([who, length]), said, ipywidgets.HBox([send, again]), box])
