"""Adapters on 4-bit experts, and that they mean the same to stock PEFT."""

from __future__ import annotations

import json

import bitsandbytes.functional as bnbf
import pytest
import torch
from bitsandbytes.nn import Params4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers import experts, qlora
from helpers.quantization import load_4bit

IDS = torch.arange(3, 43).view(2, 20)


def randomise(model, seed=5):
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if ".lora_" in n):
            p.normal_(std=0.05)
    return model


def dequantised_twin(model, folder):
    """The unquantised model with the 4-bit model's own values."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, param in twin.named_parameters():
            packed = model.get_parameter(name)
            if isinstance(packed, Params4bit):
                values = (
                    experts.dequantize_stack(packed) if param.ndim == 3 else bnbf.dequantize_4bit(packed.data, packed.quant_state)
                )
                param.copy_(values)
    return twin


def test_adapters_sit_on_attention_experts_and_router(random_mixtral):
    model = qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n for n in names)
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "experts", "gate.lora"):
        assert any(part in n for n in names), part
    assert not any("lm_head" in n for n in names)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    b = [p.grad.abs().sum() for n, p in model.named_parameters() if ".lora_B" in n]
    assert all(g > 0 for g in b), "every lora_B must get a gradient in the first step"


def test_saved_adapter_gives_the_same_logits_in_stock_peft(random_mixtral, tmp_path):
    base = load_4bit(random_mixtral, dtype="float32")
    twin = dequantised_twin(base, random_mixtral)
    ours = randomise(qlora.add_lora(base, r=4, alpha=8, dropout=0.05)).eval()
    qlora.save_lora(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.0, "stock PEFT refuses dropout here"
    stock = PeftModel.from_pretrained(twin, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, stock(IDS).logits, rtol=1e-4, atol=1e-4)
        with stock.disable_adapter(), ours.disable_adapter():
            plain = ours(IDS).logits
            torch.testing.assert_close(plain, stock(IDS).logits, rtol=1e-4, atol=1e-4)
        assert (plain - ours(IDS).logits).abs().max() > 1e-3, "the adapter must do something"


def test_gradients_equal_stock_peft_on_dequantised_weights(random_mixtral, tmp_path):
    base = load_4bit(random_mixtral, dtype="float32")
    twin = dequantised_twin(base, random_mixtral)
    ours = randomise(qlora.add_lora(base, r=4, alpha=8, dropout=0.0)).train()
    qlora.save_lora(ours, tmp_path)
    stock = PeftModel.from_pretrained(twin, str(tmp_path), is_trainable=True).train()
    grads = []
    for model in (ours, stock):
        model(IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert set(grads[0]) == set(grads[1]) and len(grads[0]) > 10
    for name, g in grads[1].items():
        assert (grads[0][name] - g).norm() <= 2e-4 * g.norm() + 1e-9, name


def test_reload_gives_the_same_bits(random_mixtral, tmp_path):
    ours = randomise(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4)).eval()
    qlora.save_lora(ours, tmp_path)
    again = qlora.load_lora(load_4bit(random_mixtral, dtype="float32"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, again(IDS).logits)
    assert not any(p.requires_grad for p in again.parameters())


def test_dropout_acts_on_experts_in_training_only(random_mixtral):
    model = randomise(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4, dropout=0.5))
    model.train()
    with torch.no_grad():
        torch.manual_seed(0)
        one = model(IDS).logits
        assert not torch.equal(one, model(IDS).logits)
        torch.manual_seed(0)
        assert torch.equal(one, model(IDS).logits)
        model.eval()
        assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_gradient_checkpointing_changes_nothing(random_mixtral):
    grads = []
    for reentrant in (None, False, True):
        model = randomise(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4, dropout=0.3)).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for other in grads[1:]:
        for name, g in grads[0].items():
            torch.testing.assert_close(other[name], g, rtol=1e-5, atol=1e-7)


def test_a_target_that_matches_nothing_is_an_error(random_mixtral):
    model = load_4bit(random_mixtral, dtype="float32")
    config = qlora.lora_config(model, r=4)
    peft_model = qlora.add_lora(model, r=4)
    config.target_modules = {"no_such_projection"}
    with pytest.raises(RuntimeError, match="no_such_projection"):
        qlora.check_adapters(peft_model, config)


def test_merging_into_packed_weights_is_refused(random_mixtral):
    model = qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4, dropout=0.0)
    with pytest.raises(NotImplementedError, match="bf16 base"):
        model.merge_and_unload()
