"""Stories from files: YAML (one story a file) and JSON lines (one story a line), checked and cleaned.

`<FIRST>` is the character that the model plays, `<SECOND>` the user:

    names:    {<FIRST>: Ferro, <SECOND>: Ana}
    persona:  {<FIRST>: "…", <SECOND>: "…"}          # older files say personas
    scenario: "…"
    conversation:
      - {name: <SECOND>, text: "…"}

Every problem names its file, line and field. The YAML is read as a stream of events into plain nodes of limited depth: tags,
aliases and duplicate keys (the ways in which YAML does more than it shows) are refused instead of resolved, all values are
text ("No" stays "No"), and nothing recurses (libyaml's own composer overflows the C stack on 100,000 brackets).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from helpers.files import write_lines
from helpers.schema import (  # the schema's names belong to this module's interface
    PLACEHOLDERS as PLACEHOLDERS,
)
from helpers.schema import (
    Message as Message,
)
from helpers.schema import (
    Pair as Pair,
)
from helpers.schema import (
    Story as Story,
)
from helpers.schema import (
    StoryError as StoryError,
)
from helpers.schema import (
    check_name as check_name,
)
from helpers.schema import (
    check_text as check_text,
)
from helpers.schema import (
    clean as clean,
)
from helpers.schema import (
    is_header as is_header,
)
from helpers.schema import (
    reply_table as reply_table,
)

MAX_STORY_BYTES = 2_000_000  # a 10k-token story has about 50 kB
MAX_DEPTH = 8  # a story has three levels
YAML_SUFFIXES, LINES_SUFFIXES = (".yaml", ".yml", ".json"), (".jsonl", ".ndjson")  # JSON is YAML, too
SCHEMA = "see the schema in data_samples/README.md"


class StoryErrors(StoryError):
    """Several stories cannot be read, or used; `problems` has a StoryError for each, the message a line."""

    SHOWN = 20

    def __init__(self, problems: list[StoryError], read: int, what: str = "cannot be read"):
        self.problems, self.read, self.what = problems, read, what
        super().__init__(f"{len(problems)} of {len(problems) + read} stories {what}", "see the list")
        more = [f"… and {len(problems) - self.SHOWN} more"] * (len(problems) > self.SHOWN)
        self.args = ("\n  ".join([f"{self.problem}:", *map(str, problems[: self.SHOWN]), *more]),)

    def __reduce__(self):
        return StoryErrors, (self.problems, self.read, self.what)


def load_stories(path: str | Path, problems: list[StoryError] | None = None) -> list[Story]:
    """All stories of a `.yaml`, `.json` or `.jsonl` file, or of a folder of such files (recursively, by name, no hidden ones).

    A bad story never stops the others. Without `problems`, StoryErrors lists all that is wrong once everything has been
    read (a StoryError, if it is one thing); with a list, each StoryError is appended to it and the good stories are returned.
    """
    path = Path(path)
    found: list[StoryError] = []
    stories: list[Story] = []
    for item in _read(path):
        (found if isinstance(item, StoryError) else stories).append(item)
    if problems is not None:
        problems += found
    elif found:
        raise found[0] if len(found) == 1 else StoryErrors(found, len(stories))
    return stories


def load_story(file: str | Path) -> Story:
    """The story of a YAML file; StoryError for anything that is not one."""
    result = next(_read_yaml(Path(file)))
    if isinstance(result, StoryError):
        raise result
    return result


def duplicates(stories: Iterable[Story]) -> list[str]:
    """A sentence for each story that was there before, word for word: it would be trained more often than the others."""
    first: dict[Story, Story] = {}
    found = []
    for story in stories:
        before = first.get(story)
        if before is None:
            first[story] = story
        else:
            found.append(f"{story.source or 'a story'} is word for word the story {before.source or 'before it'}")
    return found


def save_stories(stories: Iterable[Story], file: str | Path) -> Path:
    """Write stories as JSON lines, one a line, in the schema of the YAML files; atomic."""
    file = Path(file)
    if file.suffix not in LINES_SUFFIXES:
        raise ValueError(f"{file}: JSON lines belong into a file that ends with {' or '.join(LINES_SUFFIXES)}")
    write_lines(file, (json.dumps(story.record(), ensure_ascii=False) + "\n" for story in stories))
    return file


# ---------------------------------------------------------------------------------------------------- files and folders


def _read(path: Path) -> Iterator[Story | StoryError]:
    try:
        if path.is_dir():
            suffixes = YAML_SUFFIXES + LINES_SUFFIXES
            files = sorted(p for p in _visible(path) if p.suffix.lower() in suffixes and p.is_file())
            if not files:
                raise StoryError("no .yaml, .json or .jsonl file in this folder", "point at a folder of stories", file=str(path))
        elif path.is_file():
            files = [path]
        else:
            raise StoryError("no such file or folder", "check the path", file=str(path))
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        if isinstance(error, StoryError):
            raise
        raise StoryError(f"cannot be read ({error})", "check the path", file=str(path)) from None
    for file in files:
        yield from (_read_lines if file.suffix.lower() in LINES_SUFFIXES else _read_yaml)(file)


def _visible(folder: Path) -> Iterator[Path]:
    """The files in a folder and its folders, linked ones too, each folder once; OSError for one that may not be read.

    Hidden ones are copies that programs keep for themselves: Jupyter's .ipynb_checkpoints, macOS's ._name, an editor's .name.swp.
    """
    seen = set()

    def stop(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        if real not in seen:
            yield from (Path(place, name) for name in names if not name.startswith("."))
        seen.add(real)


def _read_yaml(file: Path) -> Iterator[Story | StoryError]:
    try:
        yield parse_story(_text(_bytes(file), str(file)), str(file))
    except StoryError as error:
        yield error


def _read_lines(file: Path) -> Iterator[Story | StoryError]:
    """Line by line, so that a file may be larger than the memory."""
    number, some = 0, False
    try:
        with file.open("rb") as lines:
            while raw := lines.readline(MAX_STORY_BYTES + 1):
                number += 1
                try:
                    if len(raw) > MAX_STORY_BYTES:
                        while raw and not raw.endswith(b"\n"):
                            raw = lines.readline(MAX_STORY_BYTES)
                        raise _too_large(None, str(file), number)
                    if text := _text(raw, str(file), number).strip():
                        some = True
                        if text in ("{", "["):  # an error for each line of it would say less
                            what, todo = "a JSON text over several lines begins", "write each story in one line"
                            yield StoryError(what, f"{todo}, or name a file of one story .json", file=str(file), line=number)
                            return
                        yield parse_record_text(text, str(file), number)
                except StoryError as error:
                    some = True
                    yield error
    except OSError as error:
        yield StoryError(f"cannot be read ({error.strerror})", "check the file", file=str(file))
    else:
        if not some:
            yield StoryError("the file is empty", "write a story a line into it", file=str(file))


def _bytes(file: Path) -> bytes:
    try:
        if (size := file.stat().st_size) > MAX_STORY_BYTES:
            raise _too_large(size, str(file))
        return file.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, StoryError):
            raise
        why = getattr(error, "strerror", None) or error
        raise StoryError(f"cannot be read ({why})", "check the file", file=str(file)) from None


def _too_large(size: int | None, file: str, line: int | None = None) -> StoryError:
    much = f"{size / 1e6:.0f} MB" if size else f"more than {MAX_STORY_BYTES / 1e6:.0f} MB"
    return StoryError(f"{much} is too large for one story", "split it, or save many stories as .jsonl", file=file, line=line)


def _text(raw: bytes, file: str, line: int | None = None) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = (line or 1) + raw.count(b"\n", 0, error.start)
        raise StoryError(f"byte {error.start} is not UTF-8", "save the file as UTF-8", file=file, line=at) from None


# ------------------------------------------------------------------------------------------------------ text → nodes


@dataclass
class Node:
    """A value of a YAML or JSON text with its line: text, a list of nodes, a list of (key, value) pairs, or something else."""

    line: int | None
    value: str | list[Node] | list[tuple[Node, Node]] | None
    kind: str  # "text", "list", "mapping", "other"
    comment: str = ""  # what stands behind a plain text as a comment


def parse_story(text: str, source: str = "<text>") -> Story:
    """A story from YAML text (and so from JSON text)."""
    fast = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        root = _nodes(yaml.parse(text, Loader=fast), source, text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        if isinstance(error, StoryError):
            raise
        root = _careful_nodes(text, source)  # slower, but its messages name the place
    return _Reader(source).story(root)


def _careful_nodes(text: str, source: str) -> Node | None:
    try:
        return _nodes(yaml.parse(text, Loader=yaml.SafeLoader), source, text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise StoryError(f"control character U+{ord(text[error.position]):04X}", "remove it", file=source, line=line) from None
    except yaml.YAMLError as error:
        mark, begun = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
        if begun and "quoted scalar" in (getattr(error, "context", None) or ""):
            mark = begun  # a quote that is never closed: where it opens, not where the file ends
        line = mark.line + 1 if mark else None
        what = getattr(error, "problem", None) or "not valid YAML"
        todo = "put the text in quotes, or write it as a block (|-)" if _PLAIN.search(what) else "correct the syntax"
        raise StoryError(f"YAML: {what}", todo, file=source, line=line) from None
    except (ValueError, OverflowError) as error:  # PyYAML lets these out for "\UFFFFFFFF" and a %YAML version of 5,000 digits
        if isinstance(error, StoryError):
            raise
        raise StoryError("YAML: a number is out of range", "look for \\U escapes and % lines", file=source) from None


_PLAIN = re.compile("mapping values are not allowed|found character .* that cannot start|alphabetic or numeric")
_COMMENT = re.compile(r"[ \t]+#(.*)")


def _joined(text: str) -> str:
    """Characters beyond 16 bits as one: JSON may write them as two halves, which YAML leaves apart."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16") if not text.isascii() else text
    except UnicodeDecodeError:  # half a one: it is refused as any other control character
        return text


def _nodes(events: Iterable[yaml.Event], source: str, text: str) -> Node | None:
    """The one document of an event stream, as nodes; None if there is none."""
    lines = text.splitlines()
    stack: list[tuple[Node, list[Node]]] = []
    root: Node | None = None
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise StoryError("YAML aliases are not used in stories", "write the text out", file=source, line=line)
        if isinstance(event, yaml.ScalarEvent):
            known = event.tag in (None, "!", "tag:yaml.org,2002:str")
            node = Node(line, _joined(event.value), "text" if known else "other")
            end = event.end_mark
            if not event.style and end.line < len(lines) and (behind := _COMMENT.match(lines[end.line], end.column)):
                node.comment = behind[0].strip()
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            if len(stack) == MAX_DEPTH:
                raise StoryError("YAML is nested too deeply", "a story has three levels", file=source, line=line)
            kind, tag = ("mapping", "map") if isinstance(event, yaml.MappingStartEvent) else ("list", "seq")
            known = event.tag in (None, "!", f"tag:yaml.org,2002:{tag}")
            stack.append((Node(line, [], kind if known else "other"), []))
            continue
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            node, children = stack.pop()
            if isinstance(event, yaml.MappingEndEvent):
                node.value = list(zip(children[::2], children[1::2], strict=True))
            else:
                node.value = children
        elif isinstance(event, yaml.DocumentStartEvent) and root is not None:
            raise StoryError("YAML: a second document begins", "one story a file", file=source, line=line)
        else:
            continue
        if stack:
            stack[-1][1].append(node)
        else:
            root = node
    return root


def parse_record_text(text: str, source: str = "<text>", line: int | None = None) -> Story:
    """A story from one line of JSON."""
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        what = getattr(error, "msg", None) or "nested too deeply"
        raise StoryError(f"JSON: {what}", "correct the line", file=source, line=line) from None
    return _Reader(source, line).story(_json_node(pairs, line))


def parse_record(record: Mapping[str, Any], source: str = "<record>") -> Story:
    """A story from a mapping in the file schema: a row of a `datasets.Dataset`, the inverse of `Story.record`."""
    return _Reader(source).story(_json_node(record, None))


class _Pairs(list):
    """A JSON object as it was written, duplicate keys included."""


def _json_node(value: Any, line: int | None, depth: int = 0) -> Node:
    if depth > MAX_DEPTH:
        return Node(line, None, "other")
    if isinstance(value, str):
        return Node(line, value, "text")
    if isinstance(value, (_Pairs, Mapping)):
        items = value if isinstance(value, _Pairs) else value.items()
        return Node(line, [(_json_node(k, line), _json_node(v, line, depth + 1)) for k, v in items], "mapping")
    if isinstance(value, (list, tuple)):
        return Node(line, [_json_node(v, line, depth + 1) for v in value], "list")
    return Node(line, None, "other")


# ------------------------------------------------------------------------------------------------------ nodes → story


class _Reader:
    """Walks nodes; knows the file, so that each error can name its place."""

    def __init__(self, source: str, line: int | None = None):
        self.source = source
        self.name = f"{source}:{line}" if line else source  # of the story: a file of lines holds many
        self.comments: list[str] = []  # left out by YAML, perhaps against the writer's will

    def error(self, node: Node | None, field: str, problem: str, todo: str) -> StoryError:
        return StoryError(problem, todo, file=self.source, line=node.line if node else None, field=field)

    def mapping(self, node: Node, field: str) -> dict[str, Node]:
        if node.kind != "mapping":
            raise self.error(node, field, "expected a mapping", SCHEMA)
        result: dict[str, Node] = {}
        for key, value in node.value:
            name = self.text(key, field or "key")
            if name in result:
                raise self.error(key, f"{field}.{name}" if field else name, "it is given twice", "keep one")
            result[name] = value
        return result

    def text(self, node: Node, field: str) -> str:
        if node.kind != "text":
            raise self.error(node, field, "expected text", "write a quoted string or a block (|-)")
        if node.comment:
            said = f"line {node.line}: {node.comment!r} is a YAML comment and was left out; quote the text to keep it"
            self.comments.append(said)
        return node.value

    def pair(self, node: Node, field: str) -> tuple[Pair, dict[str, Node]]:
        values = self.mapping(node, field)
        for key in PLACEHOLDERS:
            if key not in values:
                raise self.error(node, field, f"{key} is missing", f"add {key}: …")
        for key in values:
            if key not in PLACEHOLDERS:
                raise self.error(values[key], field, f"unknown person {key!r}", "use <FIRST> and <SECOND>")
        return Pair(*(clean(self.text(values[k], f"{field}.{k}")) for k in PLACEHOLDERS)), values

    def story(self, root: Node | None) -> Story:
        if root is None:
            raise StoryError("the file is empty", "write a story into it", file=self.source)
        fields = self.mapping(root, "")
        if "personas" in fields:
            if "persona" in fields:
                raise self.error(fields["personas"], "personas", "persona is given as well", "keep one of the two spellings")
            fields["persona"] = fields.pop("personas")
        for name in ("names", "persona", "scenario", "conversation"):
            if name not in fields:
                raise self.error(root, name, "this field is missing", SCHEMA)
        names, name_nodes = self.pair(fields["names"], "names")
        for key, name in zip(PLACEHOLDERS, names, strict=True):
            self.checked(check_name, name, name_nodes[key], f"names.{key}")

        def resolved(raw: str, node: Node, where: str) -> str:
            for key, name in zip(PLACEHOLDERS, names, strict=True):
                raw = raw.replace(key, name)
            text = clean(raw)
            if left := _UNRESOLVED.search(text):
                raise self.error(node, where, f"{left[0]} stands for nobody", "use <FIRST> or <SECOND>")
            self.checked(check_text, text, node, where)
            return text

        personas, nodes = self.pair(fields["persona"], "persona")
        personas = Pair(*(resolved(p, nodes[k], f"persona.{k}") for k, p in zip(PLACEHOLDERS, personas, strict=True)))
        scenario = resolved(self.text(fields["scenario"], "scenario"), fields["scenario"], "scenario")
        messages, repairs = self.messages(fields["conversation"], resolved)
        try:
            return Story(names, personas, scenario, tuple(messages), self.name, (*repairs, *self.comments))
        except StoryError as error:
            raise self.error(fields["names"], error.field, error.problem, error.todo) from None

    def messages(self, node: Node, resolved: Callable[[str, Node, str], str]) -> tuple[list[Message], list[str]]:
        if node.kind != "list":
            raise self.error(node, "conversation", "expected a list", "write '- name: …' entries")
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
                place = f"line {item.line}" if item.line else where
                repairs.append(f"{place}: joined to the turn before, which has the same speaker")
            else:
                messages.append(Message(speaker, text))
        if not any(m.speaker == "character" for m in messages):
            raise self.error(node, "conversation", "<FIRST> never speaks", "a story needs a reply to learn from")
        return messages, repairs

    def checked(self, check: Callable[[str, str], None], value: str, node: Node, where: str) -> None:
        try:
            check(value, where)
        except StoryError as error:
            raise self.error(node, where, error.problem, error.todo) from None


_UNRESOLVED = re.compile(r"<(?:[A-Z]+|[Ff]irst|[Ss]econd)>")
