"""The budget against what is measured, and against models that are really made."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import activation_checkpointing, budget, environment, losses, qlora
from helpers.__main__ import main
from helpers.attention import DOCUMENTS
from helpers.audit import audit
from helpers.profiles import PROFILES, ROOT
from helpers.quantization import random_4bit
from helpers.tiny import tiny_config
from tests.moe_families import COMPOSITES, causal_lms, knows_routers, tiny

SIZES = {  # hidden, layers, intermediate, vocabulary, rows, tokens, rank, dropout
    "small": (128, 4, 128, 2048, 2, 256, 16, 0.0),
    "middle": (256, 4, 448, 2048, 2, 512, 16, 0.05),
    "wide": (512, 2, 1024, 2048, 1, 512, 8, 0.0),
}


def measured(config, dtype, rows, tokens, rank, dropout, checkpointing, attention) -> int:
    """Peak bytes of the second micro-batch of an accumulated step: weights, adapters, gradients, moments, live tensors."""
    torch.manual_seed(0)
    model = qlora.add_lora(random_4bit(config, dtype), r=rank, dropout=dropout).train()
    model.get_base_model().set_attn_implementation(attention)
    if checkpointing:
        activation_checkpointing.enable(model)
        model.enable_input_require_grads()
    ids = torch.randint(3, config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(tokens).repeat(rows, 1)
    positions[:, tokens // 2 :] -= tokens // 2  # two documents a row, as packing makes them

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            batch = {"input_ids": ids, "position_ids": positions}
            loss = losses.completion_loss(model, batch, ids, model.get_base_model())
        loss.backward()

    step()
    with budget.LiveBytes() as live:
        step()
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return sum(part.bytes for part in audit(model).parts.values()) + (4 + 8) * adapters + live.peak


@pytest.mark.parametrize("attention", ["sdpa", DOCUMENTS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [pytest.param(s, marks=[pytest.mark.slow] * (s == "middle")) for s in SIZES])
def test_the_peak_is_within_a_tenth_of_the_measured_one(size, checkpointing, dtype, attention):
    hidden, layers, inner, words, rows, tokens, rank, dropout = SIZES[size]
    config = tiny_config(words, hidden, layers, inner)
    found = measured(config, dtype, rows, tokens, rank, dropout, checkpointing, attention)
    model = budget.describe(config, dtype, r=rank)
    expected = budget.estimate(model, rows, tokens, checkpointing, dropout, "cpu", masked=attention == "sdpa")
    assert 0.9 < expected.peak / found < 1.1, f"{expected.peak:,} expected, {found:,} measured"
    activations = sum(expected.parts[p] for p in ("kept", "layer"))
    assert activations > 0.25 * found, "weights alone must not carry the comparison"


@pytest.mark.parametrize("step", range(3))
def test_the_peak_at_mixtrals_shapes_is_within_a_tenth_of_what_a_gpu_took(step):
    """And not below it: what the budget calls fitting must fit."""
    found = json.loads((ROOT / "benchmarks" / "results" / "experts-h200.json").read_text(encoding="utf-8"))
    took = found["cases"]["steps"]["steps"][step]
    model = budget.describe(budget.config_of(PROFILES["a100-80"]), "bfloat16", r=found["settings"]["rank"])
    expected = budget.estimate(model, took["rows"], took["row"], True, found["settings"]["dropout"])
    assert 1 <= expected.peak / budget.GIB / took["peak_gib"] < 1.1
    assert expected.peak / budget.GIB == pytest.approx(took["budget_gib"], rel=0.01)
    assert expected.peak / budget.GIB + budget.RESERVE > took["reserved_gib"], "what torch holds, its cache included"


@pytest.mark.parametrize("left_out", [None, "experts", "router", "attention"])
def test_weights_and_adapters_are_counted_to_the_byte(left_out):
    config = tiny_config(300, 128, 2, 192)
    parts = {left_out: False} if left_out else {}
    real = audit(qlora.add_lora(random_4bit(config, "bfloat16"), r=6, **parts)).parts
    model = budget.describe(config, "bfloat16", r=6, **parts)
    assert model.weights == sum(part.bytes for name, part in real.items() if name != "adapters")
    assert model.adapters == real["adapters"].weights and real["adapters"].bytes == 4 * model.adapters


def test_the_shapes_of_the_profiles_models_have_their_published_sizes():
    """46.7 and 6.9 billion parameters; nothing is asked of a network."""
    from transformers import CONFIG_MAPPING

    assert {p.base for p in PROFILES.values()} - {PROFILES["tiny"].base} == set(budget.SHAPES)
    for base, billions in {"mistralai/Mixtral-8x7B-v0.1": 46.70, "allenai/OLMoE-1B-7B-0924": 6.92}.items():
        kind, changes = budget.SHAPES[base]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**changes))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_cards_recipe_stays_below_its_goal():
    """The course's goals by count: 4 rows of 10k tokens in 56 GiB, one in 38 GiB; weights in 4 bit, 25 GB."""
    model = budget.of_profile(PROFILES["a100-80"])
    four, one = (budget.estimate(model, rows, 10240) for rows in (4, 1))
    assert four.peak / budget.GIB < 56 and one.peak / budget.GIB < 38
    assert 22 < four.parts["weights"] / budget.GIB < 23.5
    assert four.parts["kept"] == 32 * 4 * 10240 * 4096 * 2, "one bf16 input a layer"


@pytest.mark.parametrize("name, gpu", [("t4", "T4"), ("l4", "L4"), ("a100-40", "A100-40"), ("a100-80", "A100-80")])
def test_every_profile_fits_its_gpu_and_no_weaker_one_is_promised_too_much(name, gpu):
    profile = PROFILES[name]
    found = budget.estimate(profile)
    assert found.fits(budget.GPUS[gpu]) and profile.memory_gib <= budget.GPUS[gpu]
    assert found.micro_batch == profile.micro_batch and found.context == profile.context
    if name == "a100-80":
        assert not found.fits(budget.GPUS["A100-40"])


def test_more_of_anything_needs_more_and_checkpointing_less():
    model = budget.describe(tiny_config(2048, 256, 4, 448), "float32", r=16)
    base = budget.estimate(model, 2, 512, False, 0.0).peak
    assert budget.estimate(model, 3, 512, False, 0.0).peak > base
    assert budget.estimate(model, 2, 768, False, 0.0).peak > base
    assert budget.estimate(model, 2, 512, False, 0.1).peak > base
    assert budget.estimate(model, 2, 512, True, 0.0).peak < base
    assert budget.estimate(model, 2, 512, False, 0.0, masked=True).peak > base


@pytest.mark.parametrize("gib", [0.05, 0.2, 1.0])
def test_the_suggestion_is_the_largest_that_fits(gib):
    model = budget.describe(tiny_config(2048, 256, 4, 448), "float32", r=16)
    rows, tokens = budget.suggest(model, gib, reserve=0.0)
    assert budget.estimate(model, rows, tokens).fits(gib, 0.0)
    assert not budget.estimate(model, rows + 1, tokens).fits(gib, 0.0) or rows == 1024
    assert tokens == model.sizes["longest"] or not budget.estimate(model, 1, tokens + 256).fits(gib, 0.0)
    assert budget.suggest(model, 0.01, reserve=0.0) is None


def test_nonsense_is_refused():
    model = budget.describe(tiny_config(300, 64, 1, 64))
    with pytest.raises(ValueError, match="at least 1"):
        budget.estimate(model, 0, 512)


def test_the_table_and_the_command_say_the_same(capsys):
    found = budget.estimate(PROFILES["a100-40"])
    assert [r["part"] for r in found.table] == [*budget.PARTS, "peak"]
    parts = {r["part"]: r["GiB"] for r in found.table}
    assert parts["peak"] == pytest.approx(sum(parts[p] for p in budget.PARTS) - min(parts["layer"], parts["loss"]), rel=1e-4)
    assert main(["budget", "--profile", "a100-40"]) == 0
    shown = capsys.readouterr().out
    assert f"peak        {parts['peak']:>9.3f} GiB" in shown and "T4 does not fit" in shown and "A100-40 fits" in shown
    main(["budget", "--profile", "a100-40", "--micro-batch", "4", "--no-checkpointing"])
    assert "A100-80 does not fit" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ live bytes


def test_live_bytes_counts_what_is_new_and_alive():
    before = torch.zeros(1000)
    with budget.LiveBytes() as live:
        a = torch.ones(100)  # 400 bytes
        view = before[10:20]  # nothing new
        b = a + 1  # 400 more
        assert live.now == 800 and view.numel() == 10
        del b
        assert live.now == 400
        c = torch.empty(300, dtype=torch.bfloat16)  # 600
        c.add_(1)
    assert live.peak == 1000 and c.numel() == 300


def test_what_fits_leaves_room_for_cuda():
    found = budget.Budget("x", 1, 1, {**dict.fromkeys(budget.PARTS, 0), "weights": 10 * budget.GIB})
    assert found.fits(12.0) and not found.fits(11.9) and found.fits(10.0, reserve=0.0)


def test_the_budget_of_a_profile_is_that_of_its_adapters():
    profile = dataclasses.replace(PROFILES["t4"], lora_r=8, lora_experts=False)
    small, usual = budget.of_profile(profile), budget.of_profile(PROFILES["t4"])
    more = budget.of_profile(dataclasses.replace(profile, lora_r=16))
    assert more.adapters == 2 * small.adapters and small.adapters < usual.adapters / 10


def test_the_fullest_expert_counts():
    """One expert at a time (a CPU): a quarter more tokens than the average go through its working tensors."""
    model = budget.describe(tiny_config(2048, 256, 4, 448), "float32", r=16)
    usual, even = (budget.estimate(model, 4, 512, True, 0.0, "cpu", **more).parts["layer"] for more in ({}, {"imbalance": 1.0}))
    assert even < usual


@knows_routers
def test_a_model_with_unequal_layers_is_refused_in_a_sentence_and_its_adapters_are_counted_all_the_same(tmp_path, monkeypatch):
    """Gemma 4's heads differ by layer, so its configuration does not say what the activations are made of."""
    config = tiny("gemma4_text")
    with pytest.raises(ValueError, match="activations of a gemma4_text cannot be counted from its configuration"):
        budget.describe(config)
    config.save_pretrained(tmp_path)
    profile = dataclasses.replace(PROFILES["t4"], base=str(tmp_path))
    model = qlora.add_lora(random_4bit(config), r=profile.lora_r, router=profile.lora_router)
    wanted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert budget.adapter_numbers(profile) == wanted
    assert environment.run_gib(profile) == pytest.approx(environment.SPARE_GIB + 10 * 4 * wanted / 2**30)


@pytest.mark.slow
@knows_routers
@pytest.mark.parametrize("kind", [kind for kind in causal_lms() if kind not in COMPOSITES])
def test_every_family_is_counted_or_refused_in_a_sentence(kind):
    try:
        found = budget.describe(tiny(kind))
    except ValueError as error:
        assert len(str(error)) > 60
    else:
        assert budget.estimate(found, 1, 64).peak > found.weights > 0


@pytest.mark.parametrize(
    "kind, parts",
    [
        ("qwen2_moe", "shared experts"),
        pytest.param("deepseek_v3", "shared experts and latent attention and dense layers", marks=knows_routers),
        ("mixtral", None),
        ("olmoe", None),
        ("qwen3_moe", None),
    ],
)
def test_what_is_not_counted_is_said(kind, parts):
    text = str(budget.estimate(budget.describe(tiny(kind), router=kind != "deepseek_v3"), 1, 64))
    assert (f"NOT COUNTED: the activations of {parts};" in text) if parts else ("NOT COUNTED" not in text)


def test_a_short_context_is_not_exceeded_by_the_suggestion():
    described = budget.describe(tiny("mixtral"))  # 128 positions
    rows, context = budget.suggest(described, 1.0, reserve=0.0)
    assert context == 128 and rows >= 1
