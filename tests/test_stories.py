"""Reading, checking and cleaning of stories: the published schema and rules, one by one, and arbitrary input."""

import contextlib
import copy
import json
import os
import re
from itertools import pairwise

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import schema
from helpers.profiles import ROOT
from helpers.stories import (
    MAX_STORY_BYTES,
    Message,
    Pair,
    Story,
    StoryError,
    StoryErrors,
    clean,
    duplicates,
    load_stories,
    load_story,
    parse_record,
    parse_record_text,
    parse_story,
    reply_table,
    save_stories,
)
from helpers.tiny_stories import make_story

quick = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))

YAML = """\
names:
  <FIRST>: Ferro
  <SECOND>: Ana
persona:
  <FIRST>: A clock maker.
  <SECOND>: Owns a clock.
scenario: <SECOND> visits <FIRST>.
conversation:
- name: <SECOND>
  text: "Good day, <FIRST>!"
- name: <FIRST>
  text: |-
    He looks up.

    "<SECOND>!"
"""
STORY = Story(
    names=Pair("Ferro", "Ana"),
    personas=Pair("A clock maker.", "Owns a clock."),
    scenario="Ana visits Ferro.",
    messages=(Message("user", "Good day, Ferro!"), Message("character", 'He looks up.\n\n"Ana!"')),
)


def test_schema_and_placeholders():
    story = parse_story(YAML, "a.yaml")
    assert story == STORY
    assert story.source == "a.yaml" and story.repairs == ()


def test_older_files_say_personas():
    assert parse_story(YAML.replace("persona:", "personas:")) == STORY


def test_flow_style_and_untagged_scalars_are_text():
    text = (
        "{names: {<FIRST>: No, <SECOND>: 007}, persona: {<FIRST>: 1.50, <SECOND>: yes}, scenario: 2024-01-01,"
        " conversation: [{name: <FIRST>, text: =}]}"
    )
    story = parse_story(text)
    assert story.names == ("No", "007") and story.personas == ("1.50", "yes") and story.scenario == "2024-01-01"
    assert story.messages == (Message("character", "="),)


def test_byte_order_mark_and_line_ends(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + YAML.replace("\n", "\r\n").encode())
    assert load_story(file) == STORY


def test_views_of_a_story():
    assert STORY.replies == [STORY.messages[1]]
    assert (STORY.name_of("character"), STORY.name_of("user")) == ("Ferro", "Ana")
    assert STORY.before_reply(0).messages == STORY.messages[:1]
    assert [(r["turn"], r["speaker"], r["words"]) for r in reply_table([STORY])] == [(0, "user", 3), (1, "character", 4)]


# --------------------------------------------------------------------------------------------------------- cleaning


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("a   b", "a b"),
        ("a\tb\u00a0 c", "a b c"),
        ("Stop ! Why ?", "Stop! Why?"),
        ("“Yes,” he said. ‘It’s done.’", "\"Yes,\" he said. 'It's done.'"),
        ("Well… ", "Well..."),
        ("one---two", "one—two"),
        ("one--two", "one--two"),
        ("so..yes", "so... yes"),
        ("so........yes", "so... yes"),
        ("wait....", "wait..."),
        ("wait.. no", "wait.. no"),
        ("... then", "... then"),
        ("....", "...."),
        ("a.b", "a.b"),
        ("a..b..c", "a... b... c"),
        ("so.................yes", "so... yes"),
        ("so…yes", "so... yes"),
        (" first \r\n second\r\n\r\n\r\n\r\nthird ", "first\nsecond\n\nthird"),
        ("", ""),
    ],
)
def test_cleaning_rules(raw, cleaned):
    assert clean(raw) == cleaned


messy = st.lists(
    st.one_of(st.sampled_from([*" \t\n\r.!?-—…“”‘’\u00a0\u3000\x85_a1é", "..", "....", "---", " !", "<FIRST>"]), st.characters()),
    max_size=24,
).map("".join)


@settings(quick, max_examples=300)
@given(messy)
def test_cleaning_twice_changes_nothing(text):
    assert clean(clean(text)) == clean(text)


@settings(quick, max_examples=150)
@given(messy)
def test_cleaning_keeps_letters_and_digits(text):
    assert [c for c in clean(text) if c.isalnum()] == [c for c in text if c.isalnum()]


# ----------------------------------------------------------------------------------------------------------- errors

LAUGHS = "l0: &l0 {name: <FIRST>, text: ha}\n" + "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 30))
BAD = {
    "unknown speaker": (YAML.replace("- name: <FIRST>", "- name: Ferro"), 11, "conversation[1].name", "unknown speaker 'Ferro'"),
    "no name in a turn": (YAML.replace("- name: <SECOND>\n ", "-"), 9, "conversation[0].name", "missing"),
    "no text in a turn": (YAML.replace('  text: "Good day, <FIRST>!"\n', ""), 9, "conversation[0].text", "missing"),
    "no names": (YAML.replace("names:", "nmaes:"), 1, "names", "missing"),
    "no persona": (YAML.replace("persona:", "people:"), 1, "persona", "missing"),
    "no scenario": (YAML.replace("scenario:", "scene:"), 1, "scenario", "missing"),
    "no conversation": (YAML.replace("conversation:", "chat:"), 1, "conversation", "missing"),
    "one name": (YAML.replace("  <SECOND>: Ana\n", ""), 2, "names", "<SECOND> is missing"),
    "a third person": (
        YAML.replace("  <SECOND>: Ana\n", "  <SECOND>: Ana\n  <THIRD>: Bo\n"),
        4,
        "names",
        "unknown person '<THIRD>'",
    ),
    "scenario is a list": (YAML.replace("<SECOND> visits <FIRST>.", "[a, b]"), 7, "scenario", "expected text"),
    "text is a mapping": (YAML.replace('"Good day, <FIRST>!"', "{a: b}"), 10, "conversation[0].text", "expected text"),
    "persona is text": (
        YAML.replace("persona:\n  <FIRST>: A clock maker.\n  <SECOND>: Owns a clock.", "persona: both"),
        4,
        "persona",
        "expected a mapping",
    ),
    "conversation is text": (YAML[: YAML.index("conversation:")] + "conversation: hello\n", 8, "conversation", "expected a list"),
    "a turn is text": (
        YAML.replace("- name: <SECOND>\n", "- hello\n- name: <SECOND>\n"),
        9,
        "conversation[0]",
        "expected a mapping",
    ),
    "story is a list": ("- a\n- b\n", 1, "", "expected a mapping"),
    "story is text": ("Once upon a time", 1, "", "expected a mapping"),
    "empty text": (YAML.replace('"Good day, <FIRST>!"', '"  "'), 10, "conversation[0].text", "empty"),
    "no value": (YAML.replace(" A clock maker.", ""), 5, "persona.<FIRST>", "empty"),
    "nobody speaks": (YAML[: YAML.index("- name: <FIRST>")], 9, "conversation", "<FIRST> never speaks"),
    "no turns": (YAML[: YAML.index("- name: <SECOND>")].rstrip() + " []\n", 8, "conversation", "<FIRST> never speaks"),
    "duplicate field": (YAML + "scenario: Again.\n", 16, "scenario", "given twice"),
    "duplicate key in a turn": (
        YAML.replace("  text: |-", "  name: <FIRST>\n  text: |-"),
        12,
        "conversation[1].name",
        "given twice",
    ),
    "python tag on a mapping": (YAML.replace("names:\n", "names: !!python/object:os.system\n"), 1, "names", "expected a mapping"),
    "python tag on a text": (
        YAML.replace("<SECOND> visits <FIRST>.", '!!python/object/apply:os.system ["ls"]'),
        7,
        "scenario",
        "expected text",
    ),
    "python tag on a name": (YAML.replace(" Ferro", " !!python/name:os.system Ferro"), 2, "names.<FIRST>", "expected text"),
    "python tag on the list": (
        YAML.replace("conversation:\n", "conversation: !!python/tuple\n"),
        8,
        "conversation",
        "expected a list",
    ),
    "binary": (YAML.replace(" A clock", " !!binary A clock"), 5, "persona.<FIRST>", "expected text"),
    "own tag": (YAML.replace(" A clock", " !clock A clock"), 5, "persona.<FIRST>", "expected text"),
    "both spellings": (YAML.replace("scenario:", "personas: x\nscenario:"), 7, "personas", "persona is given as well"),
    "header as a name": (YAML.replace(" Ana", ' "### Response"'), 3, "names.<SECOND>", "reads like a block header"),
    "names that look equal": (YAML.replace(" Ana", " Ｆerro"), 2, "names", "both people are called"),
    "look-alike header": (
        YAML.replace("He looks up.", "＃＃＃ Response:"),
        12,
        "conversation[1].text",
        "imitates a block header",
    ),
    "placeholder in lower case": (
        YAML.replace("!<FIRST>", "!").replace("Good day, <FIRST>", "Good day, <first>"),
        10,
        "conversation[0].text",
        "<first> stands for nobody",
    ),
    "alias": (YAML.replace(" A clock maker.", " &a A clock.").replace(" Owns a clock.", " *a"), 6, "", "aliases"),
    "alias bomb": (
        LAUGHS + YAML.replace("- name: <SECOND>\n", "- *l29\n- name: <SECOND>\n"),
        2,
        "",
        "aliases",
    ),
    "alias of a list": (LAUGHS + YAML[: YAML.index("conversation:")] + "conversation: *l1\n", 2, "", "aliases"),
    "endless alias": (YAML.replace("conversation:\n", "conversation: &a\n- *a\n"), 9, "", "aliases"),
    "unknown alias": (YAML.replace(" A clock maker.", " *nobody"), 5, "", "aliases"),
    "NUL": (YAML.replace("Good", "Go\x00od"), 10, "", "U+0000"),
    "NUL as an escape": (YAML.replace("Good", "Go\\0od"), 10, "conversation[0].text", "U+0000"),
    "bell": (YAML.replace("Owns", "Ow\\ans").replace("Ow\\ans a clock.", '"Ow\\ans a clock."'), 6, "persona.<SECOND>", "U+0007"),
    "surrogate": (YAML.replace("Good", "Go\\ud800od"), 10, "conversation[0].text", "U+D800"),
    "escape beyond Unicode": (YAML.replace("Good", "Go\\UFFFFFFFFod"), None, "", "out of range"),
    "bidi override": (YAML.replace("Good", "Go\u202eod"), 10, "conversation[0].text", "U+202E"),
    "bidi isolate in a persona": (YAML.replace("Owns", "\u2067Owns"), 6, "persona.<SECOND>", "U+2067"),
    "bidi override in a name": (YAML.replace("Ferro\n", "Fer\u202dro\n"), 2, "names.<FIRST>", "cannot be a name"),
    "third placeholder": (
        YAML.replace("Good day, <FIRST>", "Good day, <THIRD>"),
        10,
        "conversation[0].text",
        "<THIRD> stands for nobody",
    ),
    "placeholder in a persona": (YAML.replace("Owns a", "<OWNER> of a"), 6, "persona.<SECOND>", "<OWNER> stands for nobody"),
    "equal names": (YAML.replace(" Ana", " FERRO"), 2, "names", "both people are called 'FERRO'"),
    "colon in a name": (YAML.replace(" Ana", ' "Ana: x"'), 3, "names.<SECOND>", "cannot be a name"),
    "newline in a name": (YAML.replace(" Ana", ' "Ana\\nx"'), 3, "names.<SECOND>", "cannot be a name"),
    "backslash in a name": (YAML.replace(" Ana", " \\Ana"), 3, "names.<SECOND>", "cannot be a name"),
    "empty name": (YAML.replace(" Ana", ' ""'), 3, "names.<SECOND>", "a name is empty"),
    "empty file": ("", None, "", "the file is empty"),
    "comment only": ("# nothing\n", None, "", "the file is empty"),
    "not YAML": (YAML.replace('!"', "!"), 15, "", "YAML: expected <block end>"),
    "tab as indentation": (YAML.replace("  <SECOND>: Ana", "\t<SECOND>: Ana"), 3, "", "YAML: "),
    "two documents": (YAML + "---\n" + YAML, 16, "", "a second document begins"),
    "nested too deeply": ("[" * 700, None, "", "nested too deeply"),
    "huge YAML version": ("%YAML " + "9" * 5000 + ".1\n---\n" + YAML, None, "", "out of range"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_stories_name_file_line_and_field(case, tmp_path):
    text, line, field, problem = BAD[case]
    file = tmp_path / "bad.yaml"
    file.write_bytes(text.encode())
    with pytest.raises(StoryError) as caught:
        load_story(file)
    error = caught.value
    assert problem in error.problem
    assert error.file == str(file)
    assert error.field == field
    if line:
        assert error.line == line
    assert str(error).startswith(f"{file}:{error.line}: " if error.line else f"{file}: ")
    assert field in str(error) and "\n" not in str(error) and error.todo


def test_not_utf8(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_bytes(YAML.encode().replace(b"Good", b"G\xfcod"))
    with pytest.raises(StoryError, match="is not UTF-8; save the file as UTF-8") as caught:
        load_story(file)
    assert (caught.value.file, caught.value.line) == (str(file), 10)


def test_too_large(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_bytes(YAML.encode() + b"#" * MAX_STORY_BYTES)
    with pytest.raises(StoryError, match="2 MB is too large for one story"):
        load_story(file)


@pytest.mark.parametrize(
    "change",
    [
        {"names": ("Ana", "ana")},
        {"names": ("Ana ", "Bo")},
        {"names": ("A<b>", "Bo")},
        {"scenario": " x"},
        {"scenario": ""},
        {"personas": ("ok", "tab\there")},
        {"messages": [Message("narrator", "x")]},
        {"messages": [Message("user", "x\n")]},
        {"messages": [Message("user", "x\u2028y")]},
        {"messages": [Message("user", None)]},
    ],
)
def test_a_story_cannot_be_made_invalid(change):
    good = {"names": ("Ana", "Bo"), "personas": ("x", "y"), "scenario": "z", "messages": [Message("user", "hm")]}
    Story(**good)
    with pytest.raises(StoryError):
        Story(**good | change)


def test_two_turns_of_one_speaker_are_joined_and_reported():
    text = YAML.replace("- name: <FIRST>", '- name: <SECOND>\n  text: "Are you in ?"\n- name: <FIRST>')
    story = parse_story(text)
    assert [m.speaker for m in story.messages] == ["user", "character"]
    assert story.messages[0].text == "Good day, Ferro!\n\nAre you in?"
    assert story.repairs == ("line 11: joined to the turn before, which has the same speaker",)


# ---------------------------------------------------------------------------------------------------------- folders


def test_folder_returns_the_good_and_lists_the_bad(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "b.yaml").write_text(YAML)
    (tmp_path / "source" / "a.yml").write_text(YAML.replace("Ferro", "Bo"))
    (tmp_path / "bad.yaml").write_text("names: 1")
    (tmp_path / "worse.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "notes.txt").write_text("not a story")
    problems = []
    stories = load_stories(tmp_path, problems)
    assert [s.names.character for s in stories] == ["Ferro", "Bo"]
    assert [p.file for p in problems] == [str(tmp_path / "bad.yaml"), str(tmp_path / "worse.yaml")]
    with pytest.raises(StoryErrors, match="2 of 4 stories cannot be read") as caught:
        load_stories(tmp_path)
    assert [str(p) for p in caught.value.problems] == [str(p) for p in problems]
    assert all(str(p) in str(caught.value) for p in problems)
    assert str(copy.deepcopy(caught.value)) == str(caught.value)  # by the way that crosses process borders, too
    (tmp_path / "worse.yaml").unlink()
    with pytest.raises(StoryError, match=r"bad\.yaml:1: persona"):
        load_stories(tmp_path)
    assert load_stories(tmp_path / "b.yaml") == [STORY]


def test_missing_or_empty_folder(tmp_path):
    with pytest.raises(StoryError, match="no such file or folder"):
        load_stories(tmp_path / "nowhere")
    with pytest.raises(StoryError, match=r"no \.yaml, \.json or \.jsonl file in this folder"):
        load_stories(tmp_path)


# ------------------------------------------------------------------------------------------------------- JSON lines


def test_json_lines_are_the_same_stories(tmp_path):
    other = parse_story(YAML.replace("Ferro", "Bo"))
    file = save_stories([STORY, other], tmp_path / "new" / "mine.jsonl")
    assert load_stories(file) == [STORY, other] and load_stories(tmp_path) == [STORY, other]
    assert [p.name for p in file.parent.iterdir()] == ["mine.jsonl"]
    first = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    assert list(first) == ["names", "persona", "scenario", "conversation"]
    assert first["names"] == {"<FIRST>": "Ferro", "<SECOND>": "Ana"}
    assert parse_record(first) == STORY and STORY.record() == first
    with pytest.raises(ValueError, match="ends with"):
        save_stories([STORY], tmp_path / "mine.yaml")


GOOD_LINE = json.dumps(STORY.record())
BAD_LINES = {
    "broken": ("{" + GOOD_LINE, "", "JSON: "),
    "array": (f"[{GOOD_LINE}]", "", "expected a mapping"),
    "number": (GOOD_LINE.replace('"Ana visits Ferro."', "7"), "scenario", "expected text"),
    "null": (GOOD_LINE.replace('"A clock maker."', "null"), "persona.<FIRST>", "expected text"),
    "twice": (GOOD_LINE.replace('"scenario":', '"scenario": "x", "scenario":'), "scenario", "given twice"),
    "surrogate": (GOOD_LINE.replace("visits", "\\ud800"), "scenario", "U+D800"),
    "deep": ("[" * 100_000, "", "JSON: "),
    "deep but valid": (GOOD_LINE.replace('"Ana visits Ferro."', "[" * 40 + "]" * 40), "scenario", "expected text"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_name_their_number(case, tmp_path):
    line, field, problem = BAD_LINES[case]
    file = tmp_path / "mine.jsonl"
    file.write_text(f"{GOOD_LINE}\n\n{line}\n{GOOD_LINE}", encoding="utf-8")
    problems = []
    assert load_stories(file, problems) == [STORY, STORY]
    [error] = problems
    assert (error.file, error.line, error.field) == (str(file), 3, field) and problem in error.problem


def test_huge_and_undecodable_lines_do_not_stop_the_others(tmp_path):
    file = tmp_path / "mine.jsonl"
    good = GOOD_LINE.encode()
    file.write_bytes(b"\n".join([good, b"x" * (2 * MAX_STORY_BYTES + 5), b"\xff\xfe", good]))
    problems = []
    assert load_stories(file, problems) == [STORY, STORY]
    assert [(p.line, p.problem.split(" ")[-1]) for p in problems] == [(2, "story"), (3, "UTF-8")]
    file.write_text("\n\n")
    with pytest.raises(StoryError, match="the file is empty"):
        load_stories(file)


def test_a_datasets_dataset_holds_the_same_stories(tmp_path):
    from datasets import load_dataset

    from helpers.data import from_dataset, to_dataset

    other = parse_story(YAML.replace("Ferro", "Bo"))
    dataset = to_dataset([STORY, other])
    assert dataset.column_names == ["names", "persona", "scenario", "conversation"] and from_dataset(dataset) == [STORY, other]
    file = save_stories([STORY, other], tmp_path / "mine.jsonl")
    loaded = load_dataset("json", data_files=str(file), cache_dir=str(tmp_path / "cache"))["train"]
    assert from_dataset(loaded) == [STORY, other]
    with pytest.raises(StoryError, match=r"rows\[1\]: scenario: the text is empty"):
        from_dataset([STORY.record(), STORY.record() | {"scenario": " "}], "rows")


def test_deep_nesting_and_bombs_end_quickly():
    """libyaml's own composer overflows the C stack on the first two."""
    for text in ("[" * 1_900_000, "- " * 900_000, "{a: " * 400_000, "? " * 900_000, LAUGHS, '"' * 1_900_000, "a: 1\n" * 300_000):
        with pytest.raises(StoryError):
            parse_story(text)


# ------------------------------------------------------------------------------------------------------------- fuzz

pieces = [
    *re.findall(r"\S+|\s+", YAML),
    *(
        "- ",
        ": ",
        "{",
        "}",
        "[",
        "]",
        "&a ",
        "*a",
        "!!str ",
        "!x ",
        "!<",
        "%YAML 1.1\n",
        "---",
        "...",
        "|",
        ">",
        "'",
        '"',
        "#",
        "? ",
    ),
    *("<<: ", "\\x", "\\u12", "\\U00110000", "\t", "\x00", "\u2028", "\ufeff", "\ud800", "\x85", "@", "`", "~", "0x1F", "1e400"),
]
soup = st.lists(st.one_of(st.sampled_from(pieces), st.characters()), max_size=20).map("".join)
mutated = st.lists(st.tuples(st.integers(0, len(YAML)), st.integers(0, 12), soup), min_size=1, max_size=2).map(
    lambda cuts: _mutate(YAML, cuts)
)


def _mutate(text: str, cuts) -> str:
    for at, width, insert in cuts:
        text = text[:at] + insert + text[at + width :]
    return text


def _story_or_error(text: str) -> None:
    _record_or_error(text)
    try:
        story = parse_story(text, "f.yaml")
    except StoryError as error:
        assert error.file == "f.yaml"
    else:
        assert story.replies
        for message in story.messages:
            assert clean(message.text) == message.text
        assert all(a.speaker != b.speaker for a, b in pairwise(story.messages))


def _record_or_error(text: str) -> None:
    try:
        story = parse_record_text(text, "f.jsonl", 3)
    except StoryError as error:
        assert (error.file, error.line) == ("f.jsonl", 3)
    else:
        assert parse_record(story.record()) == story


@settings(quick, max_examples=300)
@given(mutated)
def test_the_fast_parser_reads_what_the_plain_one_reads(text):
    """Whatever libyaml accepts, PyYAML's own parser turns into the same story or refuses."""
    try:
        fast = parse_story(text)
    except StoryError:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "CSafeLoader", yaml.SafeLoader, raising=False)
        try:
            plain = parse_story(text)
        except StoryError:
            return
    assert plain == fast


@settings(quick, max_examples=200)
@given(mutated)
def test_changed_stories_are_read_or_refused(text):
    _story_or_error(text)


@settings(quick, max_examples=200)
@given(st.one_of(soup, st.text()))
def test_any_text_is_read_or_refused(text):
    _story_or_error(text)


@settings(quick, max_examples=100)
@given(names=st.tuples(messy, messy), texts=st.lists(messy, min_size=4, max_size=7))
def test_any_values_in_a_well_formed_file_are_read_or_refused(names, texts):
    turns = [{"name": ("<SECOND>", "<FIRST>")[i % 2], "text": t} for i, t in enumerate(texts[2:])]
    data = {"names": names, "persona": texts[:2], "scenario": texts[2]}
    data = {k: dict(zip(("<FIRST>", "<SECOND>"), v, strict=True)) if k != "scenario" else v for k, v in data.items()}
    _story_or_error(json.dumps(data | {"conversation": turns}))
    _record_or_error(json.dumps(data | {"conversation": turns}, ensure_ascii=False))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), messy),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(list(STORY.record())), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(quick, max_examples=150)
@given(st.sampled_from(list(STORY.record())), json_values)
def test_any_json_value_is_read_or_refused(key, value):
    _record_or_error(json.dumps(STORY.record() | {key: value}))
    with contextlib.suppress(StoryError):
        parse_record(STORY.record() | {key: value})


def test_hidden_copies_are_not_stories_and_duplicates_are_named(tmp_path):
    text = (ROOT / "data_samples" / "stories" / "salt_road.yaml").read_text(encoding="utf-8")
    for name in ("one.yaml", "two.yaml", "._one.yaml", ".ipynb_checkpoints/one-checkpoint.yaml"):
        (tmp_path / ".hidden" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".hidden" / name).write_text(text, encoding="utf-8")
    found = load_stories(tmp_path / ".hidden")  # what is asked for by name is read
    assert [s.source.rpartition("/")[2] for s in found] == ["one.yaml", "two.yaml"]
    (said,) = duplicates(found)
    assert said.endswith("one.yaml") and "two.yaml is word for word the story" in said
    lines = save_stories(found, tmp_path / "all.jsonl")
    assert duplicates(load_stories(lines)) == [f"{lines}:2 is word for word the story {lines}:1"]


SAMPLE = ROOT / "data_samples" / "stories" / "return_half.yaml"


def test_json_may_write_an_emoji_as_two_halves(tmp_path):
    """Python's `json.dumps` does, and YAML leaves them apart."""
    record = load_story(SAMPLE).record() | {"scenario": "A kite \U0001f600 over the mill."}
    for name in ("one.json", "one.yaml"):
        (tmp_path / name).write_text(json.dumps(record), encoding="utf-8")
        assert "\\ud83d" in (tmp_path / name).read_text(encoding="utf-8")
    found = load_stories(tmp_path)
    assert len(found) == 2 and all(story.scenario == record["scenario"] for story in found), "a .json in a folder is read, too"
    half = json.dumps(record).replace("\\ude00", "")
    with pytest.raises(StoryError, match="U\\+D83D"):
        parse_story(half)


def test_what_yaml_takes_for_a_comment_is_said():
    text = SAMPLE.read_text(encoding="utf-8")
    name = load_story(SAMPLE).names.character
    story = parse_story(text.replace(f"<FIRST>: {name}", f"<FIRST>: {name} #2", 1))
    assert story.names.character == name
    assert any("'#2' is a YAML comment and was left out; quote the text to keep it" in r for r in story.repairs)
    assert parse_story(text).repairs == load_story(SAMPLE).repairs


@pytest.mark.parametrize(
    "line, said, at",
    [
        ("scenario: it was: dark", "put the text in quotes, or write it as a block", 3),
        ("scenario: *dark", "put the text in quotes|aliases are not used", 3),
        ("scenario: @dark", "put the text in quotes", 3),
        ('scenario: "dark', "unexpected end of stream", 3),
    ],
)
def test_the_usual_slips_in_yaml_are_named_where_they_are(line, said, at):
    text = f"names: {{<FIRST>: Ferro, <SECOND>: Ana}}\npersona: {{<FIRST>: a, <SECOND>: b}}\n{line}\nconversation:\n"
    with pytest.raises(StoryError, match=said) as caught:
        parse_story(text + "- {name: <FIRST>, text: Yes.}\n" * 5)
    assert caught.value.line == at


def test_an_interrupted_save_leaves_the_old_file(tmp_path):
    file = save_stories([make_story(1)], tmp_path / "mine.jsonl")
    before = file.read_bytes()

    def broken():
        yield make_story(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_stories(broken(), file)
    assert file.read_bytes() == before


def test_before_a_reply_of_a_story_that_does_not_alternate():
    says = [Message("character", "One."), Message("character", "Two."), Message("user", "Three."), Message("character", "Four.")]
    story = Story(Pair("Ferro", "Ana"), Pair("p", "p"), "s", tuple(says))
    assert [len(story.before_reply(i).messages) for i in range(3)] == [0, 1, 3]


def test_a_cleaned_reply_can_stand_in_a_story():
    for text in ("\x07 Yes.", "Yes. \x07", "a \x07 b", "Yes.\n\x07\n\n\nNo."):
        said = schema.clean_reply(text)
        assert schema.clean(said) == said
        schema.check_text(said, "reply")


def test_tabs_are_blanks():
    assert schema.clean("a\tb") == "a b"


def test_a_byte_order_mark_is_no_text(tmp_path):
    file = save_stories([make_story(1)], tmp_path / "mine.jsonl")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_stories(file) == [make_story(1)]


def test_a_story_of_a_file_of_lines_names_its_line(tmp_path):
    save_stories([make_story(1), make_story(2)], tmp_path / "mine.jsonl")
    assert [s.source.rpartition(":")[2] for s in load_stories(tmp_path)] == ["1", "2"]


def test_two_stories_of_the_same_people_are_no_duplicates():
    a = make_story(1)
    b = Story(a.names, a.personas, a.scenario + " It rains.", a.messages)
    assert duplicates([a, b]) == [] and len(duplicates([a, b, make_story(1)])) == 1 == len(duplicates([a, a]))


def test_files_are_read_in_the_order_of_their_names(tmp_path, monkeypatch):
    for n in (3, 1, 2):
        save_stories([make_story(n)], tmp_path / f"{n}.jsonl")
    original = os.walk
    backwards = lambda *how, **more: ((place, dirs, sorted(names)[::-1]) for place, dirs, names in original(*how, **more))  # noqa: E731
    monkeypatch.setattr(os, "walk", backwards)
    assert load_stories(tmp_path) == [make_story(n) for n in (1, 2, 3)]


def test_a_linked_folder_is_read_once_and_a_circle_ends(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    save_stories([make_story(1)], mine / "here.jsonl")
    save_stories([make_story(2)], other / "there.jsonl")
    try:
        (mine / "linked").symlink_to(other, target_is_directory=True)
        (mine / "twice").symlink_to(other, target_is_directory=True)
        (other / "circle").symlink_to(mine, target_is_directory=True)
    except OSError:
        pytest.skip("links cannot be made here")
    found = load_stories(mine)
    assert sorted(found, key=str) == sorted([make_story(1), make_story(2)], key=str)


def test_a_closed_folder_is_not_passed_over(tmp_path, monkeypatch):
    save_stories([make_story(1)], tmp_path / "open.jsonl")
    (tmp_path / "closed").mkdir()
    original = os.scandir

    def scandir(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return original(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(StoryError, match=r"cannot be read \(.*Permission denied.*closed"):
        load_stories(tmp_path)


def test_json_over_several_lines_is_one_error(tmp_path):
    file = save_stories([make_story(1)], tmp_path / "mine.jsonl")
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(make_story(2).record(), indent=1))
    problems = []
    assert load_stories(file, problems) == [make_story(1)]
    assert len(problems) == 1 and (problems[0].file, problems[0].line) == (str(file), 2)
    assert "write each story in one line, or name a file of one story .json" in str(problems[0])
    file.with_suffix(".json").write_text(json.dumps(make_story(2).record(), indent=1), encoding="utf-8")
    assert load_stories(file.with_suffix(".json")) == [make_story(2)], "as it says"
