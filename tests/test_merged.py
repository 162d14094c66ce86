"""The streamed checkpoint is, to the bit, what merging the whole model in memory writes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.checkpoints import read_headers
from helpers.merging import merge, save_merged
from helpers.qlora import add_lora
from helpers.quantization import load_4bit


@pytest.fixture(scope="module")
def adapted(random_mixtral):
    model = add_lora(load_4bit(random_mixtral, dtype="float32"), r=4)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_is_the_merged_model_to_the_bit(adapted, tmp_path, dtype):
    whole = merge(adapted, dtype)
    whole.save_pretrained(tmp_path / "whole")
    files = save_merged(adapted, tmp_path / "streamed", dtype, max_shard_bytes=150_000)
    assert len(files) > 2 and max(f.stat().st_size for f in files) < 150_000 + 20_000
    wanted = load_file(tmp_path / "whole" / "model.safetensors")
    found = {k: v for f in files for k, v in load_file(f).items()}
    assert set(found) == set(wanted), "the family's own names, one tensor an expert"
    assert all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in wanted.items())
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(v.numel() * v.element_size() for v in found.values())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", dtype=dtype)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, whole(ids).logits)
    assert json.loads((tmp_path / "streamed" / "config.json").read_text()).get("quantization_config") is None


def test_one_shard_needs_no_index_and_no_folder_is_overwritten(adapted, tmp_path):
    (file,) = save_merged(adapted, tmp_path / "merged")
    assert file.name == "model.safetensors" and not (tmp_path / "merged" / "model.safetensors.index.json").exists()
    with pytest.raises(FileExistsError, match="merge into another folder"):
        save_merged(adapted, tmp_path / "merged")
    assert not (tmp_path / "merged.partial").exists()


def test_what_can_fail_fails_before_any_weights_are_written(random_mixtral, tmp_path):
    model = add_lora(load_4bit(random_mixtral, dtype="float32"), r=4)
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        save_merged(model, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    settings = model.get_base_model().generation_config
    settings.do_sample, settings.temperature = False, 0.7  # transformers saves no configuration that contradicts itself
    with pytest.raises(ValueError, match="temperature"):
        save_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not list(tmp_path.rglob("*.safetensors"))
    settings.temperature = None
    assert save_merged(model, tmp_path / "merged"), "and once it is put right, it works"


def test_the_merged_checkpoint_says_its_dtype_and_class(adapted, tmp_path):
    save_merged(adapted, tmp_path / "m", "bfloat16")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").dtype == torch.bfloat16


def test_no_shard_is_larger_than_asked(adapted, tmp_path):
    files = save_merged(adapted, tmp_path / "m", "float32", max_shard_bytes=150_000)
    for f in files:
        tensors = load_file(f)
        assert sum(t.nbytes for t in tensors.values()) <= 150_000 or len(tensors) == 1


def test_an_index_that_names_the_wrong_shard_is_found(adapted, tmp_path):
    save_merged(adapted, tmp_path / "m", "float32", max_shard_bytes=150_000)
    file = tmp_path / "m" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = sorted(index["weight_map"])
    files = sorted(set(index["weight_map"].values()))
    key = next(n for n in names if index["weight_map"][n] == files[0])
    index["weight_map"][key] = files[1]
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"lacks {key}"):
        read_headers(tmp_path / "m")
