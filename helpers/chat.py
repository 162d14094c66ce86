"""A conversation with a character: say something, ask for a length, change it whenever you like. Plain class, no widget."""

from __future__ import annotations

import contextlib
import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import torch

from helpers.files import write_text
from helpers.generation import SAMPLERS, Prompt, Sampling, stream_reply
from helpers.lengths import count_words, rank
from helpers.schema import Message, Story, clean_reply
from helpers.stories import clean

SILENCE = "..."  # stands for a reply without a word, which the format cannot hold


class Chat:
    """Keeps the story so far and the modifier of each reply; the setting (names, personas, scenario) is a story's.

    The oldest turns are left out of the prompt, never out of the transcript, when the context is full; `left_out` counts them.
    """

    def __init__(self, model, tokenizer, setting: Story, sampling: Sampling | None = None):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling or SAMPLERS["course"]
        self.story = dataclasses.replace(setting, messages=())
        self.lengths: list[str | None] = []
        self.left_out = 0
        self.tries = 0

    def say(self, text: str, length: str | None = None) -> Iterator[str]:
        """Pieces of the reply as they are made. What was received is kept, even if you stop listening half-way.

        Raises ValueError (StoryError) for an unknown length or a text that the format cannot hold, before anything is changed.
        """
        if length is not None:
            rank(length)
        said = dataclasses.replace(self.story, messages=(*self.story.messages, Message("user", clean(text))))
        return self._reply(said, self.lengths, length)

    def again(self) -> Iterator[str]:
        """Another reply to the last message, at the same length, in place of the one there. ValueError before the first one."""
        if not self.lengths:
            raise ValueError("nothing has been said yet: use say(text) first")
        *before, length = self.lengths
        asked = dataclasses.replace(self.story, messages=self.story.messages[:-1])
        return self._reply(asked, before, length, self.tries + 1)

    def _reply(self, story: Story, before: Sequence[str | None], length: str | None, sample: int = 0) -> Iterator[str]:
        """`before`: the lengths of the replies in the story. Nothing is changed until somebody listens."""
        prompt = self._prompt(story, before, length, sample)
        received: list[str] = []

        def pieces() -> Iterator[str]:
            try:
                for piece in stream_reply(self.model, self.tokenizer, prompt, self.sampling):
                    received.append(piece)
                    yield piece
            finally:
                text = clean_reply("".join(received)) or SILENCE
                self.story = dataclasses.replace(story, messages=(*story.messages, Message("character", text)))
                self.lengths, self.tries = [*before, length], sample

        return pieces()

    def _prompt(self, story: Story, before: Sequence[str | None], length: str | None, sample: int) -> Prompt:
        context = self.model.config.get_text_config().max_position_embeddings
        room = context - min(self.sampling.max_new_tokens, context // 2)
        for dropped in range(0, len(story.messages), 2):
            short = dataclasses.replace(story, messages=story.messages[dropped:])
            prompt = Prompt.of(short, self.tokenizer, length, before[dropped // 2 :], sample)
            if len(prompt.ids) <= room:
                break
        else:
            raise ValueError(f"this message alone needs {len(prompt.ids)} tokens and the context has {context}: shorten it")
        self.left_out = dropped
        return prompt

    def transcript(self, width: int = 100) -> str:
        """The conversation as text; each reply with the length that was asked for and the words that came."""
        lines, lengths = [], iter(self.lengths)
        for m in self.story.messages:
            name = self.story.name_of(m.speaker)
            if m.speaker == "character":
                asked = next(lengths)
                name += f" ({f'length = {asked}, ' if asked else ''}{count_words(m.text)} words)"
            lines += [f"{name}:"]
            for paragraph in m.text.split("\n"):
                lines += textwrap.wrap(paragraph, width, initial_indent="    ", subsequent_indent="    ")
        return "\n".join(lines) or "(nothing has been said yet)"

    def introduction(self, width: int = 100) -> str:
        """Who the character is, and the scene."""
        persona, scenario = self.story.personas.character, self.story.scenario
        return "\n".join(textwrap.wrap(persona, width) + textwrap.wrap(scenario, width))


def talk(chat: Chat, text: str, length: str | None = None) -> str:
    """`say`, waited for: the whole reply."""
    return "".join(chat.say(text, length))


COMMANDS = "/length NAME or /length none: ask for another length   /again: another reply   /quit"


LISTED = 20  # characters that are introduced; more can be chosen by number


def terminal(model, tokenizer, settings: Sequence[Story], ask=input, write=print, sampling: Sampling | None = None) -> Chat:
    """Chat at a terminal with a character of your choice; returns the chat when you say /quit or close the input.

    Ctrl-C stops a reply, and keeps what was received of it; where you are asked, it is /quit.
    """
    if not settings:
        raise ValueError("no character to talk to: give at least one story")
    for number, story in enumerate(settings[:LISTED], start=1):
        write(f"{number}. {story.names.character}: {story.personas.character}")
    if len(settings) > LISTED:
        write(f"… and more, up to {len(settings)}")
    length, chat = "medium", None
    while True:
        try:
            said = ask("talk to number: " if chat is None else f"({length or 'no length'}) you: ").strip()
        except (EOFError, KeyboardInterrupt):
            write("")
            said = "/quit"
        if said == "/quit":
            return chat or Chat(model, tokenizer, settings[0], sampling)
        if chat is None:
            if not said.isdecimal() or not 1 <= int(said) <= len(settings):
                write(f"a number from 1 to {len(settings)}, please")
                continue
            chat = Chat(model, tokenizer, settings[int(said) - 1], sampling)
            write(f"\n{chat.introduction()}\nYou are {chat.story.names.user}.\n{COMMANDS}\n")
            continue
        try:
            if said.startswith("/length"):
                wanted = said.removeprefix("/length").strip().lower()
                if wanted != "none":
                    rank(wanted)
                length = None if wanted == "none" else wanted
                continue
            if said.startswith("/") and said != "/again":
                write(COMMANDS)
                continue
            pieces = chat.again() if said == "/again" else chat.say(said, length)
            write(f"{chat.story.names.character}: ", end="")
            with contextlib.closing(pieces):  # stopped, it keeps what came
                for piece in pieces:
                    write(piece, end="", flush=True)
            write("\n")
        except KeyboardInterrupt:
            write("\n[stopped; what came is kept. /again: another reply, /quit or Ctrl-C: end]")
        except ValueError as error:
            write(f"[{getattr(error, 'problem', error)}]")
        except torch.OutOfMemoryError as error:
            first = (str(error).splitlines() or ["out of memory"])[0].rstrip(".")
            write(f"\n[{first}. What came is kept. A shorter /length needs less, and so does a new talk; or end other programs]")


def save_transcript(chat: Chat, folder: str | Path) -> Path:
    """The talk as a text file of its own, named after the time."""
    file = Path(folder) / f"{datetime.now():%Y-%m-%d_%H-%M-%S}.txt"
    write_text(file, f"{chat.introduction()}\n\n{chat.transcript()}\n")
    return file
