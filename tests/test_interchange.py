"""The format in other programs' words, against the readers of those programs or the bytes that they made."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from helpers import interchange
from helpers.lengths import label_replies
from helpers.profiles import PROFILES
from helpers.prompts import CHAT_TEMPLATE, format_story, generation_prompt, instruction
from helpers.stories import Message, Pair, Story
from helpers.tiny_stories import make_story
from helpers.tokens import IGNORED, encode, encode_all
from tests.make_tokenizers import KINDS, make_tokenizer
from tests.small_runs import STORIES

GOLDEN = Path(__file__).parent / "golden"
STORY = Story(
    names=Pair("Ferro", "Ana"),
    personas=Pair("Ferro repairs clocks. He is 61.", "Ana, 34, owns one."),
    scenario="A shop on a rainy day.",
    messages=(
        Message("user", '"Can it be saved?" Ana asks.'),
        Message("character", "Ferro opens the case.\n\nHe hums."),
        Message("user", "Ana waits."),
    ),
)
LABELLED = [(s, label_replies(s)) for s in (make_story(1), make_story(2), STORY)]


# ---------------------------------------------------------------------------------------------------------- Axolotl


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "sentencepiece"])
def test_axolotl_rows_give_our_ids_and_labels(kind):
    tokenizer = make_tokenizer(kind)
    for (story, lengths), row in zip(LABELLED, interchange.axolotl_rows(LABELLED, tokenizer), strict=True):
        ours = encode(story, tokenizer, lengths)
        # what axolotl/prompt_strategies/input_output.py does: each segment by itself, without special tokens
        ids = [tokenizer(s["text"], add_special_tokens=False).input_ids for s in row["segments"]]
        labels = [i if s["label"] else [IGNORED] * len(i) for i, s in zip(ids, row["segments"], strict=True)]
        assert sum(ids, []) == ours.input_ids and sum(labels, []) == ours.labels  # noqa: RUF017
        said = [s["text"].removesuffix(tokenizer.eos_token).strip() for s in row["segments"] if s["label"]]
        assert said == [m.text for m in story.replies]


def test_axolotl_rows_are_refused_where_segments_would_differ():
    """A SentencePiece tokenizer that puts a space in front of texts, but not after special tokens: rows cannot say that."""
    with pytest.raises(ValueError, match=r"cuts segments otherwise than running text \(token \d+: \['▁', "):
        list(interchange.axolotl_rows(LABELLED, make_tokenizer("sentencepiece")))


@pytest.mark.parametrize("long", ["split", "drop"])
def test_axolotl_rows_are_the_samples_of_the_training(long, tokenizer):
    """Stories beyond the context are split or shortened as in training: Axolotl would cut off what is too much."""
    stories = [make_story(k, max_words=300) for k in range(8)]
    labelled = [(s, label_replies(s)) for s in stories]
    ours = list(encode_all(labelled, tokenizer, 320, long=long))
    assert long == "drop" or len(ours) > len(stories), "some are split"
    assert long == "split" or any(s.dropped_turns for s in ours), "some are shortened"
    rows = list(interchange.axolotl_rows(labelled, tokenizer, 320, long))
    for sample, row in zip(ours, rows, strict=True):
        ids = [tokenizer(s["text"], add_special_tokens=False).input_ids for s in row["segments"]]
        labels = [i if s["label"] else [IGNORED] * len(i) for i, s in zip(ids, row["segments"], strict=True)]
        assert len(sample) <= 320
        assert (sum(ids, []), sum(labels, [])) == (sample.input_ids, sample.labels)  # noqa: RUF017


def test_axolotls_file_names_what_is_not_in_it():
    tiny = interchange.axolotl_yaml(PROFILES["tiny"])
    assert yaml.safe_load(tiny) == interchange.axolotl_config(PROFILES["tiny"]) and yaml.safe_load(tiny)["max_steps"] == 1600
    assert (
        "router z-loss, coefficient 0.001" in tiny
        and "balancing loss, coefficient 0.001" in tiny
        and "dropout" not in tiny.split("base_model")[0]
    )
    card = interchange.axolotl_yaml(PROFILES["a100-80"])
    assert "max_steps" not in yaml.safe_load(card) and "# Not in this recipe, unlike in the course's run: dropout of 0.05" in card


def test_axolotl_config_is_the_cards_recipe():
    config = yaml.safe_load(yaml.safe_dump(interchange.axolotl_config(PROFILES["a100-80"])))
    card = {
        "base_model": "mistralai/Mixtral-8x7B-v0.1", "learning_rate": 1e-4, "lr_scheduler": "cosine", "warmup_steps": 10,
        "micro_batch_size": 4, "gradient_accumulation_steps": 2, "num_epochs": 3, "seed": 42, "sequence_len": 10240,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "load_in_4bit": True, "adapter": "qlora",
        "lora_r": 32, "lora_alpha": 16, "bf16": True, "sample_packing": True, "quantize_moe_experts": True,
        "attn_implementation": "flash_attention_2",
    }  # fmt: skip
    assert {k: config[k] for k in card} == card
    assert config["datasets"][0]["type"] == "input_output"
    assert config["lora_target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]


# -------------------------------------------------------------------------------------------------------------- TRL


@pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")  # TRL's own
@pytest.mark.parametrize("setting", [False, True])
@pytest.mark.parametrize("kind", ["tiny", "sentencepiece"])
def test_trl_tokenises_the_rows_as_we_do(kind, setting, tmp_path):
    """The real trainer's own preparation of the dataset: ids and assistant masks."""
    pytest.importorskip("trl", reason="TRL is not installed: it wants newer packages than constraints-oldest.txt")
    import torch
    from transformers import MixtralForCausalLM
    from trl import SFTConfig, SFTTrainer

    from helpers.tiny import tiny_config

    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = Dataset.from_list(list(interchange.trl_rows(LABELLED, setting)))
    torch.manual_seed(0)
    model = MixtralForCausalLM(tiny_config(len(tokenizer), hidden=64, layers=1, intermediate=64))
    config = SFTConfig(
        output_dir=str(tmp_path), assistant_only_loss=True, max_length=None, report_to=[], use_cpu=True, bf16=False
    )
    trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    for (story, lengths), row in zip(LABELLED, trainer.train_dataset, strict=True):
        ours = encode(story, tokenizer, lengths)
        assert row["input_ids"] == ours.input_ids
        assert row["labels"] == ours.labels


# ------------------------------------------------------------------------------------------------------- KoboldCpp


def kobold_prompt(adapter: dict[str, str], messages: list[dict[str, str]]) -> str:
    """A chat request as KoboldCpp puts it together (transform_genparams, api format 4)."""
    text = ""
    for m in messages:
        kind = {"system": "system", "user": "user", "assistant": "assistant"}[m["role"]]
        text += adapter[f"{kind}_start"] + m["content"] + adapter[f"{kind}_end"]
    return text + adapter.get("assistant_gen", adapter["assistant_start"])


MESSAGES = [
    {"role": "system", "content": instruction(STORY).removeprefix("### Instruction:\n")},
    {"role": "user", "content": STORY.messages[0].text},
    {"role": "assistant", "content": STORY.messages[1].text},
    {"role": "user", "content": STORY.messages[2].text},
]


def test_koboldcpp_adapter_gives_the_bytes():
    adapter = interchange.koboldcpp_adapter("Ferro", "Ana", "long")
    assert kobold_prompt(adapter, MESSAGES) == generation_prompt(STORY, "long")
    adapter = interchange.koboldcpp_adapter("Ferro", "Ana", None, end="</s>")
    assert kobold_prompt(adapter, MESSAGES) == generation_prompt(STORY).replace("He hums.", "He hums.</s>")
    with pytest.raises(ValueError, match="unknown length"):
        interchange.koboldcpp_adapter(length="average")


# ---------------------------------------------------------------------------------------------------------- Ollama

GO = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
type Values struct { System, Prompt, Response, Suffix string; Messages []Message; Template string }
func main() {
	var v Values
	if err := json.NewDecoder(os.Stdin).Decode(&v); err != nil { panic(err) }
	template.Must(template.New("").Option("missingkey=zero").Parse(v.Template)).Execute(os.Stdout, v)
}
"""


def ollama_template(modelfile: str) -> str:
    return modelfile.split('TEMPLATE """')[1].split('"""')[0]


def ollama_stops(modelfile: str) -> list[str]:
    """As Ollama's parser reads them: what stands between three quotes, unchanged."""
    return [part.partition('"""')[0] for part in modelfile.split('PARAMETER stop """')[1:]]


def ollama_values(messages: list[dict[str, str]]) -> dict:
    """What Ollama gives a template that ranges over .Messages: all messages, and the system text by itself."""
    return {"System": messages[0]["content"], "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}


CASES = {"long": ("long", ""), "none": (None, ""), "medium-eos": ("medium", "</s>")}


def expected(length: str | None, end: str) -> str:
    return generation_prompt(STORY, length).replace("He hums.", "He hums." + end)


@pytest.mark.parametrize("case", CASES)
def test_ollama_template_gave_the_bytes_in_go(case):
    """Recorded from Go's text/template; the test below makes them anew where Go is installed."""
    length, end = CASES[case]
    golden = json.loads((GOLDEN / "ollama.json").read_text(encoding="utf-8"))[case]
    assert ollama_template(interchange.ollama_modelfile("Ferro", "Ana", length, end)) == golden["template"]
    assert golden["prompt"] == expected(length, end)


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed; the recorded bytes are checked above")
def test_ollama_template_gives_the_bytes_in_go(tmp_path):
    (tmp_path / "main.go").write_text(GO)
    environment = {
        "GOCACHE": str(tmp_path / "cache"),
        "GOPATH": str(tmp_path / "go"),
        "HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    environment["PATH"] = str(Path(shutil.which("go")).parent) + ":" + environment["PATH"]
    subprocess.run(["go", "build", "-o", "render", "main.go"], cwd=tmp_path, env=environment | {"GO111MODULE": "off"}, check=True)
    for length, end in CASES.values():
        template = ollama_template(interchange.ollama_modelfile("Ferro", "Ana", length, end))
        values = json.dumps(ollama_values(MESSAGES) | {"Template": template})
        made = subprocess.run([str(tmp_path / "render")], input=values.encode(), capture_output=True, check=True).stdout
        assert made.decode() == expected(length, end)


def test_modelfile_says_system_and_stops():
    text = interchange.ollama_modelfile("Ferro", "Ana", "tiny", "</s>", instruction(STORY), "./ferro.gguf")
    assert text.startswith("FROM ./ferro.gguf\n") and f'SYSTEM """{MESSAGES[0]["content"]}"""' in text
    assert ollama_stops(text) == ["\n### Input:", "\n### Response:", "\n### Instruction:", "\nAna:", "</s>"]
    quoted = interchange.ollama_modelfile("Ferro", 'Bo "B" Ek', "tiny")
    assert ollama_stops(quoted)[-1] == '\nBo "B" Ek:' and '\nBo "B" Ek: {{ .Content }}' in ollama_template(quoted)
    with pytest.raises(ValueError, match="cannot hold"):
        interchange.ollama_modelfile(system='He said """')


# ----------------------------------------------------------------------------------------------------- SillyTavern


def test_sillytavern_presets_say_the_formats_words():
    presets = interchange.sillytavern_presets(length="long")
    assert presets["instruct"]["last_output_sequence"].endswith("### Response: (length = long)")
    assert presets["instruct"]["names_behavior"] == "always"
    assert presets["context"]["story_string"].startswith("### Instruction:\n{{char}}'s Persona: ")
    assert presets["sysprompt"]["content"].startswith("Play the role of {{char}}. Taking the above information")
    assert interchange.sillytavern_presets(end="</s>")["instruct"]["output_suffix"] == "</s>\n"


def test_sillytavern_sent_the_bytes():
    """Recorded from the program itself, 1.10 to 1.19; holds as long as the presets are the ones that were recorded."""
    golden = json.loads((GOLDEN / "sillytavern.json").read_text(encoding="utf-8"))
    assert golden["presets"]["plain"] == interchange.sillytavern_presets(length="long")
    assert golden["presets"]["with_end"] == interchange.sillytavern_presets(length="long", end="</s>")
    assert {v.rpartition(".")[0] for v in golden["versions"]} >= {"1.10", "1.11", "1.12", "1.13", "1.14", "1.16", "1.19"}
    for version, sent in golden["versions"].items():
        assert sent["plain"] == generation_prompt(STORY, "long"), version
        assert sent["with_end"] == expected("long", "</s>"), version
        assert {"\n### Input:", "\n### Response:", "\nAna:"} <= set(sent["stops"]), version


def test_all_exports_begin_from_one_text():
    """Whatever the format says of a turn, every preset says the same."""
    text = format_story(STORY, ["long"])
    adapter = interchange.koboldcpp_adapter("Ferro", "Ana", "long")
    for start in (adapter["user_start"] + '"Can', adapter["assistant_gen"] + " Ferro opens"):
        assert start in text


def test_a_t4_is_not_asked_for_what_it_cannot_run():
    """FlashAttention 2 wants compute capability 8; without it Axolotl's packed stories would see each other."""
    config = interchange.axolotl_config(PROFILES["t4"])
    assert (config["attn_implementation"], config["sample_packing"], config["fp16"]) == ("sdpa", False, True)


def test_axolotl_adapts_what_the_profile_adapts_and_stops_where_it_stops():
    profile = dataclasses.replace(PROFILES["a100-80"], lora_router=False, max_steps=7)
    config = interchange.axolotl_config(profile)
    assert config["max_steps"] == 7 and config["lora_target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert "mlp.gate.weight" in interchange.axolotl_config(PROFILES["a100-80"])["lora_target_parameters"]


def test_rows_whose_labels_differ_are_refused(tokenizer, monkeypatch):
    real = interchange.encode_all

    def other(*args, **kwargs):
        for sample in real(*args, **kwargs):
            yield dataclasses.replace(sample, labels=[-100, *sample.labels[1:-1], -100])

    monkeypatch.setattr(interchange, "encode_all", other)
    with pytest.raises(ValueError):
        list(interchange.axolotl_rows(STORIES[:1], tokenizer))
