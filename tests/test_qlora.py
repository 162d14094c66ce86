"""Adapters on 4-bit experts, and that they mean the same to stock PEFT."""

from __future__ import annotations

import json

import bitsandbytes.functional as bnbf
import pytest
import torch
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from helpers import experts, qlora
from helpers.quantization import audit, load_4bit, save_4bit

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
    config.target_modules = r".*\.q_proj"  # stock PEFT also takes a pattern
    qlora.check_adapters(peft_model, config)


@pytest.mark.parametrize("targets", ["mlp.experts.", ""])
def test_an_adapter_trained_by_stock_peft_loads_here(random_mixtral, tmp_path, targets):
    """`target_parameters` trained a few steps without this package's wrapper, named in full or by the ending."""
    base = load_4bit(random_mixtral, dtype="float32")
    twin = dequantised_twin(base, random_mixtral)
    torch.manual_seed(0)
    parameters = [f"{targets}{stack}" for stack in reversed(experts.STACKS)]
    stock = get_peft_model(twin, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=parameters)).train()
    optimizer = torch.optim.AdamW([p for p in stock.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        stock(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    stock.save_pretrained(str(tmp_path))
    ours = qlora.load_lora(base, tmp_path).eval()
    assert sum(isinstance(m, qlora.ParamWrapper) for m in ours.modules()) == 4, "two stacks in each of two layers"
    with torch.no_grad():
        trained = stock.eval()(IDS).logits
        torch.testing.assert_close(ours(IDS).logits, trained, rtol=1e-4, atol=1e-4)
        with stock.disable_adapter():
            assert (stock(IDS).logits - trained).abs().max() > 0.1, "training must have changed something"


def test_training_dropout_is_kept_beside_the_files(random_mixtral, tmp_path):
    qlora.save_lora(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4, dropout=0.3), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.0
    again = qlora.load_lora(load_4bit(random_mixtral, dtype="float32"), tmp_path, trainable=True)
    stacks = [m for m in again.modules() if isinstance(m, qlora.ParamWrapper) and m._param_ndim == 3]
    assert stacks and all(m.expert_dropout == {"default": 0.3} for m in stacks)
    assert again.peft_config["default"].lora_dropout == 0.3
    asleep = qlora.load_lora(load_4bit(random_mixtral, dtype="float32"), tmp_path)
    assert asleep.peft_config["default"].lora_dropout == 0.0


def test_each_part_can_be_left_out(random_mixtral):
    parts = {"attention": "self_attn", "experts": ".experts.", "router": ".gate."}
    for left_out in parts:
        model = qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4, **{left_out: False})
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert {part: any(word in n for n in names) for part, word in parts.items()} == {p: p != left_out for p in parts}


def test_two_active_adapters_add_up(random_mixtral, tmp_path):
    """Against stock PEFT, which forms the sum of both products."""
    base = load_4bit(random_mixtral, dtype="float32")
    twin = dequantised_twin(base, random_mixtral)
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        kwargs = {"r": 4 + 2 * seed, "alpha": 8, "dropout": 0.0, "attention": False, "router": False}
        qlora.save_lora(randomise(qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), **kwargs), seed), folder)
    models = [qlora.load_lora(base, folders[0]), PeftModel.from_pretrained(twin, str(folders[0]))]
    with torch.no_grad():
        for model in models:
            model.eval().load_adapter(str(folders[1]), "two")
            model.base_model.set_adapter(["default", "two"])
        ours, stock = (model(IDS).logits for model in models)
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
        models[0].base_model.set_adapter(["default"])
        assert (models[0](IDS).logits - ours).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------- merging


def test_peft_itself_refuses_to_merge_into_packed_weights(random_mixtral):
    model = qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4, dropout=0.0)
    with pytest.raises(NotImplementedError, match=r"qlora\.merge"):
        model.merge_and_unload()


def trained(folder, **kwargs):
    return randomise(qlora.add_lora(load_4bit(folder, dtype="float32"), r=4, alpha=8, dropout=0.05, **kwargs)).eval()


def test_merged_in_fp32_it_is_the_same_model(random_mixtral, tmp_path):
    ours = trained(random_mixtral)
    plain = qlora.merge(ours, "float32")
    assert type(plain).__name__ == "MixtralForCausalLM" and not hasattr(plain.config, "quantization_config")
    assert not any(isinstance(p, Params4bit) or ".lora_" in n for n, p in plain.named_parameters())
    with torch.no_grad():
        wanted = ours(IDS).logits
        torch.testing.assert_close(plain(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        plain.save_pretrained(tmp_path)  # an ordinary checkpoint, read by stock transformers
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_merged_weights_equal_stock_pefts_merge(random_mixtral, tmp_path):
    ours = trained(random_mixtral)
    qlora.save_lora(ours, tmp_path)
    plain = qlora.merge(ours, "float32")
    twin = dequantised_twin(load_4bit(random_mixtral, dtype="float32"), random_mixtral)
    stock = PeftModel.from_pretrained(twin, str(tmp_path)).merge_and_unload()
    for name, param in stock.named_parameters():
        torch.testing.assert_close(plain.get_parameter(name), param, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 8), (torch.float16, 11)])
def test_merging_rounds_every_weight_once(random_mixtral, dtype, bits):
    """By at most half a unit in the last place: 2⁻⁸ in bf16 (8 significant bits), 2⁻¹¹ in fp16 (11). The logits follow."""
    ours = trained(random_mixtral)
    exact, merged = qlora.merge(ours, "float32"), qlora.merge(ours, dtype)
    for name, param in merged.named_parameters():
        assert param.dtype == dtype
        wanted = exact.get_parameter(name)
        assert ((param.float() - wanted).abs() <= 2.0**-bits * wanted.abs() * 1.001 + 2.0**-25).all(), name
    with torch.no_grad():
        logits, unmerged = merged.float()(IDS).logits, ours(IDS).logits
    # of a token at a time: where a router is nearly undecided, rounding can tip it, and that token goes another way
    off = (logits - unmerged).norm(dim=-1) / unmerged.norm(dim=-1)
    assert off.median() < 2.0**-bits * 2 and (off < 0.05).float().mean() > 0.75


def test_merged_into_4_bit_it_is_rounded_again_and_says_how_much(random_mixtral, tmp_path):
    ours = trained(random_mixtral)
    exact = qlora.merge(ours, "float32")
    with torch.no_grad():
        wanted = ours(IDS).logits
        with ours.disable_adapter():
            untouched = ours(IDS).logits
    base, rows = qlora.merge_4bit(ours)
    assert audit(base).ok and not any(".lora_" in n for n, _ in base.named_parameters())
    assert {r["parameter"].rpartition(".")[2] for r in rows} == {"weight", *experts.STACKS} and len(rows) == 2 * 7
    for row in rows:  # the report, from the weights themselves
        now, should = base.get_parameter(row["parameter"]), exact.get_parameter(row["parameter"])
        if not isinstance(now, Params4bit):
            assert torch.equal(now, should) and row["error"] < 1e-5
            continue
        values = experts.dequantize_stack(now) if should.ndim == 3 else bnbf.dequantize_4bit(now.data, now.quant_state)
        codes, _ = bnbf.quantize_4bit(should.contiguous(), blocksize=64, quant_type="nf4")
        assert torch.equal(codes, now.data), "the codes are bitsandbytes' of the exact sum"
        assert 0 < (values - should).norm() / should.norm() < 0.12, "NF4 is off by a tenth"
        assert row["error"] * row["change"] == pytest.approx(((values - should).norm() / should.norm()).item(), rel=0.25)
        assert row["kept"] > 0.5
    with torch.no_grad():
        logits = base(IDS).logits
        assert (logits - wanted).norm() < (untouched - wanted).norm(), "most of so large an adapter survives"
        save_4bit(base, tmp_path)
        assert torch.equal(load_4bit(tmp_path, dtype="float32").eval()(IDS).logits, logits)
