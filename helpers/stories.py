"""Stories: two-person role-play chats, read from YAML, checked and cleaned.

One story a file. `<FIRST>` is the character that the model plays, `<SECOND>` the user:

    names:    {<FIRST>: Ferro, <SECOND>: Ana}
    persona:  {<FIRST>: "…", <SECOND>: "…"}          # older files say personas
    scenario: "…"
    conversation:
      - {name: <SECOND>, text: "…"}

The YAML is composed into nodes and walked by hand: every problem can name its line, and tags, aliases and duplicate keys
(the ways in which YAML does more than it shows) are refused instead of resolved.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

MAX_FILE_BYTES = 2_000_000  # a 10k-token story has about 50 kB
PLACEHOLDERS = {"<FIRST>": "character", "<SECOND>": "user"}
Speaker = Literal["character", "user"]


class StoryError(ValueError):
    """One sentence: where (file, line, field), what is wrong, what to do."""

    def __init__(self, problem: str, todo: str, *, file: str = "", line: int | None = None, field: str = ""):
        self.file, self.line, self.field, self.problem, self.todo = file, line, field, problem, todo
        place = f"{file}:{line}" if line and file else file or (f"line {line}" if line else "")
        super().__init__(": ".join(p for p in (place, field, f"{problem}; {todo}") if p))


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
        if self.names.character.casefold() == self.names.user.casefold():
            raise StoryError(f"both people are called {self.names.user!r}", "give them two names", field="names")
        texts = {"scenario": self.scenario, "persona.character": self.personas.character, "persona.user": self.personas.user}
        texts |= {f"conversation[{i}].text": m.text for i, m in enumerate(self.messages)}
        for where, text in texts.items():
            check_text(text, where)
        for i, m in enumerate(self.messages):
            if m.speaker not in ("character", "user"):
                raise StoryError(f"unknown speaker {m.speaker!r}", "use 'character' or 'user'", field=f"conversation[{i}]")

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


def check_name(name: str, where: str) -> None:
    if not isinstance(name, str) or not name.strip():
        raise StoryError("a name is empty", "give both people a name", field=where)
    if name != name.strip() or any(c in ":\n<>\\" for c in name) or _first_control(name):
        raise StoryError(
            f"{name!r} cannot be a name", "names have no colon, line break, <, >, backslash or outer spaces", field=where
        )


def check_text(text: str, where: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise StoryError("the text is empty", "write something or remove the entry", field=where)
    if text != text.strip():
        raise StoryError("the text begins or ends with white space", "strip it", field=where)
    if bad := _first_control(text.replace("\n", "")):
        raise StoryError(f"control character U+{ord(bad):04X}", "remove it", field=where)


def _first_control(text: str) -> str | None:
    """The first control, bidirectional-override, line-separator or surrogate character (ordinary \\n excepted by callers)."""
    if text.isascii() and text.isprintable():
        return None
    for c in text:
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069":
            return c
    return None


# The original dataset builder's clean-up, in its order (typography that differs between writers, not their words).
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


def clean(text: str) -> str:
    """Straight quotes, plain dots, single spaces, no trailing blanks. Idempotent."""
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    return text.strip()


# ---------------------------------------------------------------------------------------------------------- reading


def load_stories(path: str | Path, problems: list[StoryError] | None = None) -> list[Story]:
    """All stories of a `.yaml` file or of a folder (recursively, in name order).

    Without `problems` the first bad story raises its StoryError. With a list, bad stories are left out, each with its
    StoryError appended, and the good ones are returned.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".yaml", ".yml") and p.is_file())
        if not files:
            raise StoryError("no .yaml file in this folder", "point at a folder of stories", file=str(path))
    elif path.is_file():
        files = [path]
    else:
        raise StoryError("no such file or folder", "check the path", file=str(path))
    stories = []
    for file in files:
        try:
            stories.append(load_story(file))
        except StoryError as error:
            if problems is None:
                raise
            problems.append(error)
    return stories


def load_story(file: str | Path) -> Story:
    """One story from one YAML file; StoryError for anything that is not one."""
    file = Path(file)
    try:
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise StoryError(f"{size / 1e6:.0f} MB is too large for one story", "split the file", file=str(file))
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise StoryError(f"byte {error.start} is not UTF-8", "save the file as UTF-8", file=str(file), line=line) from None
    except OSError as error:
        raise StoryError(f"cannot be read ({error.strerror})", "check the file", file=str(file)) from None
    return parse_story(text, str(file))


def parse_story(text: str, source: str = "<text>") -> Story:
    """A story from YAML text."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise StoryError(f"control character U+{ord(text[error.position]):04X}", "remove it", file=source, line=line) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else None
        what = getattr(error, "problem", None) or "not valid YAML"
        raise StoryError(f"YAML: {what}", "correct the syntax", file=source, line=line) from None
    except RecursionError:
        raise StoryError("YAML is nested too deeply", "a story has three levels", file=source) from None
    except (ValueError, OverflowError):  # PyYAML lets these out for "\UFFFFFFFF" and a %YAML version of 5,000 digits
        raise StoryError("YAML: a number is out of range", "look for \\U escapes and % lines", file=source) from None
    return _Reader(source).story(root)


# What PyYAML makes of untagged values: they are all text here ("No" stays "No").
_PLAIN_TAGS = {f"tag:yaml.org,2002:{t}" for t in ("str", "bool", "int", "float", "null", "timestamp", "merge", "value")}


class _Reader:
    """Walks YAML nodes; knows the file, so that each error can name its place."""

    def __init__(self, source: str):
        self.source = source
        self.seen: set[int] = set()

    def error(self, node, field: str, problem: str, todo: str) -> StoryError:
        line = node.start_mark.line + 1 if node is not None else None
        return StoryError(problem, todo, file=self.source, line=line, field=field)

    def mapping(self, node, field: str) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
            raise self.error(node, field, "expected a mapping", "see the schema in data_samples/README.md")
        self.once(node, field)
        result: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = self.text(key, field or "key")
            if name in result:
                raise self.error(key, f"{field}.{name}" if field else name, "it is given twice", "keep one")
            result[name] = value
        return result

    def once(self, node, field: str) -> None:
        """An alias yields the same node twice. Refusing it also defuses exponential 'YAML bombs'."""
        if id(node) in self.seen:
            raise self.error(node, field, "YAML aliases are not used in stories", "write the text out")
        self.seen.add(id(node))

    def text(self, node, field: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _PLAIN_TAGS:
            raise self.error(node, field, "expected text", "write a quoted string or a block (|-)")
        self.once(node, field)
        return node.value

    def pair(self, node, field: str) -> tuple[Pair, dict[str, yaml.Node]]:
        values = self.mapping(node, field)
        for key in PLACEHOLDERS:
            if key not in values:
                raise self.error(node, field, f"{key} is missing", f"add {key}: …")
        for key in values:
            if key not in PLACEHOLDERS:
                raise self.error(values[key], field, f"unknown person {key!r}", "use <FIRST> and <SECOND>")
        return Pair(*(clean(self.text(values[k], f"{field}.{k}")) for k in PLACEHOLDERS)), values

    def story(self, root) -> Story:
        if root is None:
            raise StoryError("the file is empty", "write a story into it", file=self.source)
        fields = self.mapping(root, "")
        if "persona" not in fields and "personas" in fields:
            fields["persona"] = fields.pop("personas")
        for name in ("names", "persona", "scenario", "conversation"):
            if name not in fields:
                raise self.error(root, name, "this field is missing", "see the schema in data_samples/README.md")
        names, name_nodes = self.pair(fields["names"], "names")
        for key, name in zip(PLACEHOLDERS, names, strict=True):
            self.checked(check_name, name, name_nodes[key], f"names.{key}")

        def resolved(raw: str, node, where: str) -> str:
            for key, name in zip(PLACEHOLDERS, names, strict=True):
                raw = raw.replace(key, name)
            text = clean(raw)
            if left := re.search(r"<[A-Z]+>", text):
                raise self.error(node, where, f"{left[0]} stands for nobody", "use <FIRST> or <SECOND>")
            self.checked(check_text, text, node, where)
            return text

        personas, nodes = self.pair(fields["persona"], "persona")
        personas = Pair(*(resolved(p, nodes[k], f"persona.{k}") for k, p in zip(PLACEHOLDERS, personas, strict=True)))
        scenario = resolved(self.text(fields["scenario"], "scenario"), fields["scenario"], "scenario")
        messages, repairs = self.messages(fields["conversation"], resolved)
        try:
            return Story(names, personas, scenario, tuple(messages), self.source, tuple(repairs))
        except StoryError as error:
            raise self.error(fields["names"], error.field, error.problem, error.todo) from None

    def messages(self, node, resolved) -> tuple[list[Message], list[str]]:
        if not isinstance(node, yaml.SequenceNode) or node.tag != "tag:yaml.org,2002:seq":
            raise self.error(node, "conversation", "expected a list", "write '- name: …' entries")
        self.once(node, "conversation")
        messages: list[Message] = []
        repairs: list[str] = []
        for i, item in enumerate(node.value):
            where = f"conversation[{i}]"
            entry = self.mapping(item, where)
            for key in ("name", "text"):
                if key not in entry:
                    raise self.error(item, f"{where}.{key}", "this field is missing", "each turn has name and text")
            who = self.text(entry["name"], f"{where}.name")
            if who not in PLACEHOLDERS:
                raise self.error(entry["name"], f"{where}.name", f"unknown speaker {who!r}", "use <FIRST> or <SECOND>")
            text = resolved(self.text(entry["text"], f"{where}.text"), entry["text"], f"{where}.text")
            speaker = PLACEHOLDERS[who]
            if messages and messages[-1].speaker == speaker:
                messages[-1] = Message(speaker, messages[-1].text + "\n\n" + text)
                repairs.append(f"line {item.start_mark.line + 1}: joined to the turn before, which has the same speaker")
            else:
                messages.append(Message(speaker, text))
        if not any(m.speaker == "character" for m in messages):
            raise self.error(node, "conversation", "<FIRST> never speaks", "a story needs a reply to learn from")
        return messages, repairs

    def checked(self, check, value: str, node, where: str) -> None:
        try:
            check(value, where)
        except StoryError as error:
            raise self.error(node, where, error.problem, error.todo) from None


def reply_table(stories: list[Story]) -> Iterator[dict]:
    """One row a message: story, speaker, words. The table behind the dataset tour's figures."""
    for number, story in enumerate(stories):
        for turn, m in enumerate(story.messages):
            yield {"story": number, "turn": turn, "speaker": m.speaker, "words": len(m.text.split())}
