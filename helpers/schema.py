"""What a story is: two people, a scenario, turns; the checks that make every `Story` safe to format, and the clean-up."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from helpers.lengths import count_words

PLACEHOLDERS = {"<FIRST>": "character", "<SECOND>": "user"}
Speaker = Literal["character", "user"]


class StoryError(ValueError):
    """One sentence: where (file, line, field), what is wrong, what to do."""

    def __init__(self, problem: str, todo: str, *, file: str = "", line: int | None = None, field: str = ""):
        self.file, self.line, self.field, self.problem, self.todo = file, line, field, problem, todo
        place = f"{file}:{line}" if line and file else file or (f"line {line}" if line else "")
        super().__init__(": ".join(p for p in (place, field, f"{problem}; {todo}") if p))

    def __reduce__(self):  # an exception with keywords does not cross process borders otherwise
        return _story_error, (self.problem, self.todo, self.file, self.line, self.field)


def _story_error(problem, todo, file, line, field):
    return StoryError(problem, todo, file=file, line=line, field=field)


class Pair(NamedTuple):
    """A value for each of the two people."""

    character: str
    user: str


@dataclass(frozen=True)
class Message:
    speaker: Speaker
    text: str


@dataclass(frozen=True)
class Story:
    """A chat with its setting. Invariants are checked on creation, so every Story can be formatted and parsed back."""

    names: Pair
    personas: Pair
    scenario: str
    messages: tuple[Message, ...]
    source: str = field(default="", compare=False)
    repairs: tuple[str, ...] = field(default=(), compare=False)  # what cleaning changed in structure

    def __post_init__(self):
        object.__setattr__(self, "names", Pair(*self.names))
        object.__setattr__(self, "personas", Pair(*self.personas))
        object.__setattr__(self, "messages", tuple(self.messages))
        for who, name in self.names._asdict().items():
            check_name(name, f"names.{who}")
        if _folded(self.names.character) == _folded(self.names.user):
            raise StoryError(f"both people are called {self.names.user!r}", "give them two names", field="names")
        check_text(self.scenario, "scenario")
        for who, persona in self.personas._asdict().items():
            check_text(persona, f"persona.{who}")
        for i, m in enumerate(self.messages):
            if m.speaker not in ("character", "user"):
                raise StoryError(f"unknown speaker {m.speaker!r}", "use 'character' or 'user'", field=f"conversation[{i}]")
            check_text(m.text, f"conversation[{i}].text")

    @property
    def replies(self) -> list[Message]:
        """The character's messages, in order: what a model is trained to write."""
        return [m for m in self.messages if m.speaker == "character"]

    def name_of(self, speaker: Speaker) -> str:
        return getattr(self.names, speaker)

    def before_reply(self, index: int) -> Story:
        """The story up to, not including, the character's reply number `index` (0 = the first)."""
        at = [i for i, m in enumerate(self.messages) if m.speaker == "character"][index]
        return Story(self.names, self.personas, self.scenario, self.messages[:at], self.source)

    def record(self) -> dict[str, Any]:
        """The story in the file schema, as plain dicts and lists: a line of JSON, a row of a `datasets.Dataset`."""
        first, second = PLACEHOLDERS
        who = {speaker: key for key, speaker in PLACEHOLDERS.items()}
        return {
            "names": {first: self.names.character, second: self.names.user},
            "persona": {first: self.personas.character, second: self.personas.user},
            "scenario": self.scenario,
            "conversation": [{"name": who[m.speaker], "text": m.text} for m in self.messages],
        }


# -------------------------------------------------------------------------------------------------------- invariants

# Controls (all but \n), line and paragraph separators, bidirectional overrides and isolates, lone surrogates.
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
BLANKS = " \t\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_HEADER = re.compile(rf"[{BLANKS}\\]*#+[{BLANKS}]*(?:instruction|input|response)(?!\w)", re.A | re.I)


def is_header(line: str) -> bool:
    r"""Could a model take this line for a block header (`### Input:`, any case, spacing and number of #)?

    Backslashes in front do not matter: `prompts.escape` adds one to every such line.
    """
    return _HEADER.match(line) is not None


# Cyrillic and Greek letters that look like those of the three header words (Unicode's confusables.txt has many more).
_DOUBLES = str.maketrans("іιıѕсϲоοрρеєтτυսпг", "iiisccooppeettuunr")


def _folded(text: str) -> str:
    """Text as it looks: compatibility forms and Cyrillic and Greek doubles replaced (`＃` → `#`), invisible format characters
    removed, case ignored."""
    if text.isascii():
        return text.casefold()
    seen = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    return seen.casefold().translate(_DOUBLES)


def check_name(name: str, where: str) -> None:
    if not isinstance(name, str) or not name.strip():
        raise StoryError("a name is empty", "give both people a name", field=where)
    if name != name.strip() or any(c in ":\n<>\\" for c in name) or _CONTROL.search(name):
        raise StoryError(
            f"{name!r} cannot be a name", "names have no colon, line break, <, >, backslash or outer spaces", field=where
        )
    if is_header(_folded(name)):
        raise StoryError(f"{name!r} reads like a block header", "choose another name", field=where)


def check_text(text: str, where: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise StoryError("the text is empty", "write something or remove the entry", field=where)
    if text[0].isspace() or text[-1].isspace():
        raise StoryError("the text begins or ends with white space", "strip it", field=where)
    if bad := _CONTROL.search(text):
        raise StoryError(f"control character U+{ord(bad[0]):04X}", "remove it", field=where)
    if not text.isascii():
        for line in text.split("\n"):
            if not line.isascii() and not is_header(line) and is_header(_folded(line)):
                raise StoryError(f"{line[:40]!r} imitates a block header with look-alike characters", "reword it", field=where)


# ---------------------------------------------------------------------------------------------------------- clean-up

# The original dataset builder's rules, in its order (typography that differs between writers, not their words).
_CLEANING = [
    (re.compile(r"\r\n?"), "\n"),
    (re.compile("[\u201c\u201d]"), '"'),
    (re.compile("[\u2018\u2019]"), "'"),
    (re.compile("\u2026"), "..."),
    (re.compile(r"---"), "\u2014"),
    (re.compile(r"(?<=\w)\.{2,}(?=\w)"), "... "),  # his stop at eight dots and skip every other one of a..b..c
    (re.compile(r"(?<=\w)\.{3,}"), "..."),
    (re.compile(r"[ \t\u00a0]+"), " "),
    (re.compile(r" ([!?])"), r"\1"),
    (re.compile(r" *\n *"), "\n"),
    (re.compile(r"\n{3,}"), "\n\n"),
]
# Most texts are clean already: one search that finds whatever a rule could change saves eleven passes.
_DIRTY = re.compile("[\r\t\u00a0\u2018\u2019\u201c\u201d\u2026]|---|\\.\\.|  | [!?\n]|\n |\n\n\n")


def clean(text: str) -> str:
    """Straight quotes, plain dots, single spaces, no trailing blanks. Idempotent."""
    if _DIRTY.search(text):
        for pattern, replacement in _CLEANING:
            text = pattern.sub(replacement, text)
    return text.strip()


def clean_reply(text: str) -> str:
    """What a model wrote, so that it can stand in a story: cleaned, and without the control characters that a story refuses."""
    return clean(_CONTROL.sub("", text))


def reply_table(stories: Sequence[Story]) -> Iterator[dict]:
    """One row a message: story, speaker, words. The table behind the dataset tour's figures."""
    for number, story in enumerate(stories):
        for turn, m in enumerate(story.messages):
            yield {"story": number, "turn": turn, "speaker": m.speaker, "words": count_words(m.text)}
