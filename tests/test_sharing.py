"""What leaves the house: chat template, presets and model card."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest
import torch

from helpers import model_card, sharing, training
from helpers.evaluation import held_out
from helpers.files import write_json
from helpers.lengths import label_replies
from helpers.profiles import PROFILES, ROOT
from helpers.prompts import CHAT_TEMPLATE, chat_messages, generation_prompt
from helpers.quantization import load_4bit
from helpers.stories import load_stories
from helpers.tokens import encode
from helpers.training import load_result, profile_of
from tests.test_evaluation import table

STORIES = load_stories(ROOT / "data_samples" / "stories")


@pytest.mark.parametrize("story", STORIES[:4], ids=lambda s: s.names.character)
def test_the_chat_template_gives_the_bytes_of_the_generation_prompt(story, tokenizer):
    before = story.before_reply(2)
    history = label_replies(before)
    text = tokenizer.apply_chat_template(
        chat_messages(before, history), chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True,
        char=story.names.character, user=story.names.user, length="medium",
    )  # fmt: skip
    assert text.replace("</s>", "").removeprefix("<s>") == generation_prompt(before, "medium", history)


def test_the_chat_templates_assistant_mask_is_our_completion_mask(tokenizer):
    story = held_out(PROFILES["tiny"], 1, reply=2)[0]
    lengths = label_replies(story)
    out = tokenizer.apply_chat_template(
        chat_messages(story, lengths), chat_template=CHAT_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True,
        char=story.names.character, user=story.names.user,
    )  # fmt: skip
    ours = encode(story, tokenizer, lengths)
    n = len(ours)
    assert out["input_ids"][:n] == ours.input_ids
    assert [bool(m) for m in out["assistant_masks"][:n]] == [label != -100 for label in ours.labels]


def test_sillytavern_presets_say_the_formats_words():
    presets = sharing.sillytavern_presets(length="long")
    assert presets["instruct"]["last_output_sequence"].endswith("### Response: (length = long)")
    assert presets["instruct"]["names_behavior"] == "always"
    assert presets["context"]["story_string"].startswith("### Instruction:\n{{char}}'s Persona: ")
    assert presets["sysprompt"]["content"].startswith("Play the role of {{char}}. Taking the above information")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of one step with a measured table."""
    folder = tmp_path_factory.mktemp("run")
    profile = dataclasses.replace(PROFILES["tiny"], max_steps=1, lora_r=4, context=512, micro_batch=1)
    training.train(profile, held_out(PROFILES["tiny"], 2, reply=1), folder, progress=None)
    table(lambda c, i: i + 3).save(folder / "evaluation" / "1-adapter.json")
    adapter = dataclasses.replace(table(lambda c, i: i + 3), label="adapter")
    adapter.save(folder / "evaluation" / "1-adapter.json")
    claim = {"claim": "replies follow", "measured": "+0.50", "goal": ">= 0.90", "reached": False}
    write_json(folder / "behaviour.json", {"conclusions": [claim]})
    return folder


def test_the_cards_numbers_are_those_of_the_run(run):
    facts, measured = training.load_result(run).facts, sharing.evaluations(run)[0]
    card = sharing.write_model_card(run).read_text(encoding="utf-8")
    assert f"- training_steps: {facts['steps']}" in card and "- LoRA: r 4, alpha 32" in card
    assert f"- torch {facts['versions']['torch']}" in card and "| unlimited | 150 or more |" in card
    assert "### Response: (length = medium)\n{char}:" in card and "| replies follow | +0.50 | >= 0.90 | no |" in card
    for row in measured.rows:
        assert f"| {row['length']} | {row['mean']:.1f} | {row['low']:.1f}–{row['high']:.1f} |" in card
    assert f"- learning_rate: {PROFILES['tiny'].learning_rate}" in card and "nf4" in card


def test_the_cards_metadata_is_what_the_hub_reads(run):
    """Read back with huggingface_hub, and the rules of its schema that can be checked offline."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(sharing.write_model_card(run, datasets=["someone/stories"], license="cc-by-4.0"))
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "text-generation", "cc-by-4.0")
    assert data.datasets == ["someone/stories"] and "length-control" in data.tags
    assert data.base_model is None, "the tiny base is not on the Hub, and a name that is not there would be a dead link"
    s = sharing.evaluations(run)[0].statistics
    found = {(r.metric_type, r.metric_name): r.metric_value for r in data.eval_results}
    assert found["spearmanr", "Spearman, class asked for and words of single replies"] == pytest.approx(s["spearman"], abs=1e-4)
    assert found["accuracy", "Replies within one class of it"] == pytest.approx(s["within_one"], abs=1e-4) and len(found) == 4
    for result in data.to_dict()["model-index"][0]["results"]:
        assert set(result) >= {"task", "dataset", "metrics"} and {"type", "name"} <= set(result["dataset"])
        assert all(isinstance(m["value"], float) for m in result["metrics"])
    from helpers.model_card import metadata

    hub = metadata(PROFILES["a100-80"], []).to_dict()
    assert hub["base_model"] == "mistralai/Mixtral-8x7B-v0.1" and "model-index" not in hub


def test_exports_come_from_the_run(run):
    for target in sharing.TARGETS:
        assert sharing.export(run, target).exists()
    assert (run / "adapter" / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    assert json.loads((run / "export" / "koboldcpp_adapter.json").read_text())["assistant_gen"].count("(length = medium)") == 1
    named = sharing.export(run, "ollama", "Ferro", "Ana", None).read_text(encoding="utf-8")
    assert "### Response:\nFerro:" in named and "\nAna: " in named and "(length" not in named
    assert "</s>" in named, "the adapter was trained with an end-of-sequence token after each reply"
    with pytest.raises(ValueError, match="unknown target"):
        sharing.export(run, "fax")


def test_the_bundle_is_complete_and_its_checksums_hold(run):
    import hashlib

    from transformers import AutoTokenizer

    adapter = run / "adapter"
    files = {p.relative_to(adapter).as_posix() for p in sharing.bundle(run)}
    wanted = {"README.md", "SHA256SUMS", "chat_template.jinja", "presets/Modelfile", "presets/sillytavern/instruct.json"}
    assert wanted <= files
    lines = (adapter / "SHA256SUMS").read_text().splitlines()
    sums = dict(reversed(line.split("  ", 1)) for line in lines)
    assert set(sums) == files - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((adapter / name).read_bytes()).hexdigest() == digest
    assert AutoTokenizer.from_pretrained(adapter).chat_template == CHAT_TEMPLATE
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == PROFILES["tiny"].base
    assert sharing.bundle(run), "a second time as well"


class FakeApi:
    def __init__(self, private: bool = True):
        self.calls, self.private = [], private

    def repo_info(self, *_, **__):
        return SimpleNamespace(private=self.private)

    def __getattr__(self, name):
        return lambda *a, **k: self.calls.append((name, a, k))


def test_nothing_is_sent_that_was_not_shown(run, capsys, monkeypatch):
    import huggingface_hub

    def never(*a, **k):
        raise AssertionError("a dry run must not even make a client")

    sharing.bundle(run)
    (run / "adapter" / "diary.txt").write_text("not yours")
    (run / "adapter" / "optimizer.pt").write_bytes(b"0")
    monkeypatch.setattr(huggingface_hub, "HfApi", never)
    plan = sharing.push_to_hub(run, "me/adapter")
    said = capsys.readouterr().out
    assert "would send to me/adapter (private)" in said and "nothing was sent" in said
    assert said.count("stays here") == 2 and "diary.txt" in said
    listed = {line.split()[-1] for line in said.splitlines() if " bytes " in line}
    assert listed == {item.path for item in plan} and not {"diary.txt", "optimizer.pt"} & listed

    api = FakeApi()
    assert sharing.push_to_hub(run, "me/adapter", send=True, api=api) == plan
    (create, commit) = api.calls
    assert create[0] == "create_repo" and create[2]["private"] is True and commit[0] == "create_commit"
    sent = {op.path_in_repo: op.path_or_fileobj for op in commit[1][1]}
    assert set(sent) == listed and all(sent[i.path] == (run / "adapter" / i.path).read_bytes() for i in plan)
    for name in ("diary.txt", "optimizer.pt"):
        (run / "adapter" / name).unlink()


def test_a_path_of_this_machine_is_not_sent(run):
    sharing.bundle(run)
    readme = run / "adapter" / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8") + f"\nsee {ROOT}/runs\n", encoding="utf-8")
    api = FakeApi()
    with pytest.raises(ValueError, match="holds the path"):
        sharing.push_to_hub(run, "me/adapter", send=True, api=api)
    assert api.calls == []
    sharing.bundle(run)
    sharing.push_to_hub(run, "me/adapter")


@pytest.fixture
def local_run(run, tmp_path):
    """The same run, trained on a base in a folder of its own."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(run, folder)
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    facts["profile"]["base"] = "/content/drive/MyDrive/bases/mine"
    write_json(folder / "run.json", facts)
    return folder


def test_a_local_base_is_called_one_and_its_path_is_not_sent(local_run):
    sharing.bundle(local_run)
    card = (local_run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "A LoRA adapter for a local base model (`/content/drive" in card and "tiny Mixtral" not in card
    api = FakeApi()
    with pytest.raises(ValueError, match=r"holds the path /content/drive/MyDrive/bases/mine.*--base-name ORG/NAME"):
        sharing.push_to_hub(local_run, "me/adapter", send=True, api=api)
    assert api.calls == []
    with pytest.raises(ValueError, match="ORG/NAME"):
        sharing.bundle(local_run, base_name="mine")
    sharing.bundle(local_run, base_name="org/mine")
    card = (local_run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "A LoRA adapter for org/mine, trained" in card and "base_model: org/mine" in card
    assert json.loads((local_run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/mine"
    assert "base_model: org/mine" in (local_run / "adapter" / "presets" / "axolotl.yaml").read_text()
    sharing.push_to_hub(local_run, "me/adapter", send=True, api=api)
    assert len(api.calls) == 2


def test_the_shipped_base_is_known_by_any_path(run):
    profile = dataclasses.replace(PROFILES["tiny"], base=str(ROOT / PROFILES["tiny"].base))
    assert model_card.shared_profile(profile).base == PROFILES["tiny"].base
    assert model_card.base_in_words(PROFILES["tiny"]).startswith("the course's tiny Mixtral")
    assert model_card.base_in_words(PROFILES["a100-80"]) == "mistralai/Mixtral-8x7B-v0.1"


def test_the_language_is_said_only_where_it_is_known(run, tmp_path):
    assert "language" not in sharing.write_model_card(run).read_text(encoding="utf-8").split("---")[1], "stories were given"
    folder = tmp_path / "own"
    shutil.copytree(run, folder)
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    write_json(folder / "run.json", facts | {"stories": training.OF_PROFILE})
    assert "language: en" in sharing.write_model_card(folder).read_text(encoding="utf-8")


def test_names_and_targets_reach_the_adapters_presets(run, tmp_path):
    folder = tmp_path / "named"
    shutil.copytree(run, folder)
    for made in (folder / "export", folder / "adapter" / "presets"):
        shutil.rmtree(made, ignore_errors=True)
    sharing.bundle(folder, char="Ferro", user="Ana", targets=["ollama"])
    assert [p.name for p in (folder / "adapter" / "presets").iterdir()] == ["Modelfile"]
    assert "### Response:\nFerro:" in (folder / "adapter" / "presets" / "Modelfile").read_text(encoding="utf-8")
    assert sorted(p.name for p in (folder / "export").iterdir()) == ["Modelfile", "chat_template.jinja"]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"targets": ["fax"]}, "unknown target 'fax'"),
        ({"char": "A:B"}, "cannot be a name"),
        ({"char": "Ana", "user": "Ana"}, "both people"),
        ({"length": "gigantic"}, "unknown length"),
        ({"base_name": "x"}, "ORG/NAME"),
        ({"repo_id": "adapter"}, "USER/NAME"),
        ({"per_expert": "tests"}, "tests exists"),
        ({"repo_id": "me/my adapter"}, "USER/NAME"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_written(run, request_, said, tmp_path):
    folder = tmp_path / "fresh"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("export", "presets", "README.md"))
    with pytest.raises((ValueError, FileExistsError), match=said):
        sharing.check_request(folder, **request_)
    if not {"repo_id", "per_expert"} & set(request_):
        with pytest.raises(ValueError, match=said):
            sharing.bundle(folder, **request_)
    assert not (folder / "export").exists() and not (folder / "adapter" / "README.md").exists()


def test_an_upload_that_fails_is_one_sentence(run):
    class Broken:
        def create_repo(self, *a, **k):
            import httpx

            raise httpx.ConnectError("no route to host")

    sharing.bundle(run)
    with pytest.raises(OSError, match=r"the upload to me/adapter failed, no commit was made .ConnectError: no route to host"):
        sharing.push_to_hub(run, "me/adapter", send=True, api=Broken())


def test_an_adapter_that_is_gone_says_what_to_do(run, tmp_path):
    folder = tmp_path / "gone"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "adapter")
    with pytest.raises(FileNotFoundError, match=r"lacks adapter_config.json: delete .*result.json and give the same train"):
        sharing.bundle(folder)


def test_a_merge_is_refused_before_the_model_is_loaded_and_appears_whole(run, tmp_path, monkeypatch):
    from helpers import experiment

    def never(*_):
        raise AssertionError("loaded")

    loaded = experiment.load_run(run)[1:]
    monkeypatch.setattr(experiment, "load_run", never)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="merge into another folder"):
        sharing.merge_run(run, tmp_path / "there")
    asked = []
    monkeypatch.setattr(sharing.shutil, "disk_usage", lambda p: asked.append(p) or SimpleNamespace(free=3 * 2**20))
    with pytest.raises(OSError, match="GiB of disk"):
        sharing.merge_run(run, tmp_path / "not" / "yet")
    assert asked == [tmp_path], "the disk of the folder that will be written"
    monkeypatch.undo()

    class Tokenizer:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        sharing.merge_run(run, tmp_path / "merged", loaded=(loaded[0], Tokenizer()))
    assert not (tmp_path / "merged").exists(), "a folder without tokenizer is not called whole"
    merged = sharing.merge_run(run, tmp_path / "merged", loaded=loaded)
    assert {"tokenizer.json", "SHA256SUMS", "config.json"} <= {p.name for p in merged.iterdir()}
    assert [p.name for p in tmp_path.glob("merged*")] == ["merged"]


def test_without_a_bundle_it_says_what_to_call(run):
    sharing.bundle(run)
    (run / "adapter" / "SHA256SUMS").unlink()
    with pytest.raises(FileNotFoundError, match="python -m helpers share"):
        sharing.push_to_hub(run, "me/adapter")


def alone(code: str, folder):
    """Run code in a fresh interpreter that cannot see this package."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    before = 'import sys\nsys.modules["helpers"] = None  # importing it raises\nimport torch\ntorch.manual_seed(0)\n'
    code = before + code
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_anyone_can_chat_with_the_folder_and_without_this_package(run, tmp_path):
    """The card's own lines, as printed, with the adapter on its base and with the merged weights."""
    from helpers.model_card import usage, usage_merged

    sharing.bundle(run)
    base = str(ROOT / PROFILES["tiny"].base)
    card = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert usage(PROFILES["tiny"].base, sampling=model_card.measured_with(model_card.evaluations(run))) in card
    merged = sharing.merge_run(run, tmp_path / "merged", max_shard_bytes=10**6)
    out = alone(usage_merged(str(merged)) + 'print("=====")\n' + usage(base, str(run / "adapter")), tmp_path)
    assert out.returncode == 0, out.stderr[-2000:]
    replies = out.stdout.split("=====")
    # The run was a few steps long: what is said may go on into another turn, but the prompt is cut off before it.
    assert len(replies) == 2 and all(r.strip() and "### Instruction" not in r[:100] for r in replies)


def test_a_missing_run_says_what_to_type(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m helpers train"):
        sharing.write_model_card(tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m helpers train"):
        sharing.bundle(tmp_path)


# ------------------------------------------------------------------------------------------------------ paths of Windows


WINDOWS = PureWindowsPath(r"C:\Users\ana\new runs")


def test_the_card_chats_with_the_settings_of_its_table():
    """A shorter limit than the measurement's would cut the longest classes."""
    from helpers.generation import SAMPLERS, Sampling

    for sampling in [*SAMPLERS.values(), Sampling(top_k=20, typical_p=0.9, max_new_tokens=77)]:
        (call,) = (
            node
            for node in ast.walk(ast.parse(model_card.usage("base", "folder", sampling)))
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "generate"
        )
        given = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
        assert given.pop("do_sample") is (sampling.temperature > 0) and given.pop("max_new_tokens") == sampling.max_new_tokens
        if sampling.temperature:
            assert given.pop("top_k") == sampling.top_k, "`generate` has one of its own"
            names = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty")
            neutral = {"temperature": None, "min_p": 0}
            assert given == {n: v for n in names if (v := getattr(sampling, n)) != neutral.get(n, 1)}
        else:
            assert given == {}


@pytest.mark.parametrize("program", [model_card.usage_merged(str(WINDOWS)), model_card.usage(str(WINDOWS), str(WINDOWS))])
def test_a_program_names_a_windows_path_as_it_is(program):
    """`\\U`, `\\n` and `\\r` would be escapes."""
    strings = [node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)]
    assert strings.count(str(WINDOWS)) >= 2


@pytest.mark.parametrize("text", [str(WINDOWS), json.dumps({"base": str(WINDOWS / "base")}), WINDOWS.as_posix()])
def test_a_windows_path_is_found_in_every_spelling(text, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: WINDOWS)
    file = tmp_path / "adapter_config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="holds the path"):
        sharing._refuse_paths(file)


def test_a_model_that_would_not_fit_is_not_merged(run, monkeypatch):
    """Mixtral takes 87 GiB; a disk that is full in the middle, or a child that is killed, would say less."""
    from helpers.experiment import load_run

    _, model, tokenizer = load_run(run)
    assert sharing.no_room_for_merged(model, run) is None
    monkeypatch.setattr(sharing, "host_memory_gib", lambda: 0.004)
    assert "this machine has 0.0 GiB" in sharing.no_room_for_merged(model, run)
    assert sharing.no_room_for_merged(model, run, memory=False) is None
    monkeypatch.setattr(sharing.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 2**20))
    with pytest.raises(OSError, match=r"GiB of disk, and 0\.0 GiB are free"):
        sharing.merge_run(run, loaded=(model, tokenizer))


def test_what_shall_be_private_does_not_go_into_a_repository_that_is_public(run):
    """`create_repo(private=True, exist_ok=True)` leaves one that exists as it is."""
    sharing.bundle(run)
    api = FakeApi(private=False)
    with pytest.raises(ValueError, match="me/adapter exists and is public: nothing was sent"):
        sharing.push_to_hub(run, "me/adapter", send=True, api=api)
    assert [name for name, *_ in api.calls] == ["create_repo"]
    sharing.push_to_hub(run, "me/adapter", send=True, private=False, api=api)
    assert [name for name, *_ in api.calls][-1] == "create_commit"


def test_the_card_of_a_run_of_several_processes_counts_them_all(run):
    facts = {**load_result(run).facts, "processes": 2, "micro_batch": 3, "accumulation": 4}
    rows = dict(model_card._hyperparameters(profile_of(run), facts))
    assert (rows["processes"], rows["total_train_batch_size"]) == (2, 24)


def test_the_adapter_in_the_layout_of_transformers_4_is_the_same_adapter(run, tmp_path):
    from safetensors.torch import load_file

    from helpers import adapters_convert, qlora

    there = sharing.export_per_expert(run, tmp_path / "per-expert")
    names = set(load_file(there / "adapter_model.safetensors"))
    assert any(name.endswith("layers.0.block_sparse_moe.experts.3.w1.lora_A.weight") for name in names)
    assert {"SHA256SUMS", "tokenizer.json"} <= {p.name for p in there.iterdir()} and not list(tmp_path.glob("*.unfinished"))
    back = adapters_convert.from_per_expert(there, tmp_path / "back")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (run / "adapter", back))
    for name, tensor in ours.items():
        if "experts" not in name:
            assert torch.equal(tensor, theirs[name])
    profile = profile_of(run)
    ids = torch.arange(3, 40).unsqueeze(0)
    logits = []
    for folder in (run / "adapter", back):
        base = load_4bit(profile.base_path, dtype=profile.dtype, device_map="cpu")
        with torch.no_grad():
            logits.append(qlora.load_lora(base, folder).eval()(ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(FileExistsError, match="exists: write the adapter into another folder"):
        sharing.export_per_expert(run, there)


def test_pipes_in_a_claim_do_not_break_the_cards_table(run):
    claims = [{"claim": "base: |Spearman| at most 0.1", "measured": "+0.05", "goal": "|..| <= 0.1", "reached": True}]
    text = model_card.render(profile_of(run), load_result(run).facts, [], {"conclusions": claims})
    (row,) = [line for line in text.splitlines() if "at most 0.1" in line]
    assert row.replace(r"\|", "").count("|") == 5, "four columns"


def test_conversations_of_ones_own_are_not_called_held_out(run):
    tables, behaviour = sharing.evaluations(run) or [table(lambda c, i: 9)], {"conversations": {"held out": False}}
    tables = [dataclasses.replace(t, label="adapter") for t in tables]
    text = model_card.render(profile_of(run), load_result(run).facts, tables, behaviour)
    assert "held-out" not in text and "which the training may have seen" in text
    assert "held-out-conversations" in model_card.render(profile_of(run), load_result(run).facts, tables)


def test_public_is_public_and_nothing_is_sent_unasked(run, capsys):
    sharing.bundle(run)
    api = FakeApi()
    sharing.push_to_hub(run, "me/adapter", api=api)
    assert api.calls == []
    sharing.push_to_hub(run, "me/adapter", send=True, private=False, api=api)
    assert api.calls[0][2]["private"] is False and "(public)" in capsys.readouterr().out


def test_a_file_that_changes_after_the_list_is_not_sent(run, monkeypatch):
    sharing.bundle(run)
    card, api, shown = run / "adapter" / "README.md", FakeApi(), builtins.print
    before = card.read_text()

    def meanwhile(*args, **kwargs):
        card.write_text(before + "more")
        shown(*args, **kwargs)

    monkeypatch.setattr(builtins, "print", meanwhile)
    try:
        with pytest.raises(ValueError, match="changed since it was listed"):
            sharing.push_to_hub(run, "me/adapter", send=True, api=api)
    finally:
        card.write_text(before)
    assert api.calls == []


def test_a_merged_model_speaks_the_format(run, tmp_path):
    from transformers import AutoTokenizer

    for place in (run / "adapter").glob("chat_template.jinja"):
        place.unlink()
    folder = sharing.merge_run(run, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT_TEMPLATE
