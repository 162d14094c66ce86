"""Loading in 4 bit: what the audit sees, what it refuses, and that saving loses nothing."""

from __future__ import annotations

import bitsandbytes.functional as bnbf
import pytest
import torch
from bitsandbytes.nn import Params4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers import experts
from helpers.quantization import audit, load_4bit, router_modules, save_4bit

IDS = torch.arange(3, 43).view(2, 20)


def stacks(model):
    return [(m, name) for m in model.modules() if experts.is_experts(m) for name in experts.STACKS]


def test_every_expert_and_attention_weight_is_nf4_and_the_router_is_not(random_mixtral):
    model = load_4bit(random_mixtral, dtype="float32")
    report = audit(model)
    assert report.ok
    assert report.parts["experts"].four_bit == report.parts["experts"].weights == 2 * 8 * (3 * 64 * 64)
    assert report.parts["attention"].four_bit == report.parts["attention"].weights
    assert report.parts["router"].four_bit == 0
    assert all(not isinstance(p, Params4bit) for m in router_modules(model) for p in m.parameters())
    total = sum(p.quant_state.shape.numel() if isinstance(p, Params4bit) else p.numel() for p in model.parameters())
    assert report.table[-1]["weights"] == total
    assert {r["part"] for r in report.table} >= {"experts", "attention", "router", "norms", "embeddings", "all"}


def test_codes_are_those_that_bitsandbytes_gives_the_checkpoint(random_mixtral):
    model = load_4bit(random_mixtral, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(random_mixtral, dtype=torch.float32)
    for (packed, name), (module, _) in zip(stacks(model), stacks(plain), strict=True):
        codes, state = bnbf.quantize_4bit(
            getattr(module, name).data.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        assert torch.equal(codes, getattr(packed, name).data)
        assert torch.equal(state.absmax, getattr(packed, name).quant_state.absmax)


def test_the_audit_catches_what_stock_loading_does(random_mixtral):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    stock = AutoModelForCausalLM.from_pretrained(random_mixtral, quantization_config=config, dtype=torch.float32)
    report = audit(stock)
    assert stock.is_loaded_in_4bit, "the stock flag says that all is well"
    assert not report.ok and "experts are not 4-bit" in report.problems[0]
    with pytest.raises(RuntimeError, match="experts are not 4-bit"):
        report.check()


def test_the_audit_catches_a_quantised_router(random_mixtral):
    model = load_4bit(random_mixtral, dtype="float32")
    router = router_modules(model)[0]
    router.weight = experts.quantize_stack(torch.randn(1, 64, 64))
    assert any("router is 4-bit" in p for p in audit(model).problems)


def test_logits_equal_those_of_the_dequantised_model(random_mixtral):
    model = load_4bit(random_mixtral, dtype="float32").eval()
    plain = AutoModelForCausalLM.from_pretrained(random_mixtral, dtype=torch.float32).eval()
    with torch.no_grad():
        for (packed, name), (module, _) in zip(stacks(model), stacks(plain), strict=True):
            getattr(module, name).copy_(experts.dequantize_stack(getattr(packed, name)))
        for name, param in plain.named_parameters():
            twin = model.get_parameter(name)
            if isinstance(twin, Params4bit) and param.ndim == 2:
                param.copy_(bnbf.dequantize_4bit(twin.data, twin.quant_state))
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)


def test_save_and_reload_is_bit_identical_and_small(random_mixtral, tmp_path):
    model = load_4bit(random_mixtral, dtype="float32").eval()
    save_4bit(model, tmp_path)
    again = load_4bit(tmp_path, dtype="float32").eval()
    for (a, name), (b, _) in zip(stacks(model), stacks(again), strict=True):
        assert torch.equal(getattr(a, name).data, getattr(b, name).data)
        assert torch.equal(experts.dequantize_stack(getattr(a, name)), experts.dequantize_stack(getattr(b, name)))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert not list(tmp_path.glob("*.bin")), "safetensors only"


def test_a_layout_that_cannot_be_served_is_refused_with_the_reason(tmp_path):
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, head_dim=16, layer_types=["full_attention"],
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="transposed"):
        load_4bit(tmp_path, dtype="float32")


def test_a_dense_model_is_refused(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="no experts found"):
        load_4bit(tmp_path, dtype="float32")


def test_olmoe_loads_too(tmp_path):
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        num_experts=16, num_experts_per_tok=8,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(tmp_path)
    report = audit(load_4bit(tmp_path, dtype="float32"))
    assert report.ok and report.parts["experts"].four_bit == 16 * 3 * 64 * 64
