"""Adapters in the naming of transformers 4: the layout, pinned with experts that can be told apart, and exactness."""

from __future__ import annotations

import itertools
import json
import re
import warnings

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from helpers import experts, merging, qlora
from helpers.adapters_convert import NAMINGS, WEIGHTS, from_per_expert, to_per_expert
from helpers.quantization import load_4bit
from helpers.tiny import tiny_config
from tests.moe_families import knows_routers, tiny

IDS = torch.arange(3, 43).view(2, 20)
E, H, I, R = 8, 64, 128, 4  # noqa: E741  I ≠ H, so that no projection can be taken for another
ROOT = "base_model.model.model.layers.1."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    MixtralForCausalLM(tiny_config(256, hidden=H, layers=2, intermediate=I)).save_pretrained(folder)
    return folder


def adapter(base, folder, scale=True, **kwargs):
    model = qlora.add_lora(load_4bit(base, dtype="float32"), **{"r": R, "alpha": 8, "dropout": 0.0, **kwargs})
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in sorted((n, p) for n, p in model.named_parameters() if ".lora_" in n):
            p.normal_(std=0.05)
            if scale and ".experts." in name and ".lora_B" in name:  # expert e's B is (e + 1) times as large
                p.mul_(torch.arange(1, E + 1).repeat(p.shape[1] // E))
    qlora.save_lora(model, folder)
    return model.eval()


def stock_logits(base, folder):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder)).eval()
    with torch.no_grad():
        return model(IDS).logits


def products(model):
    """B·A times scaling of every expert, from the live model: {(layer, stack): (E, out, in)}."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, qlora.ParamWrapper) and module._param_ndim == 3:
            f = module.factors("default")
            found[int(name.split(".")[4]), module.parameter_name] = (f.scale * f.B @ f.A).detach()
    return found


def test_every_expert_keeps_its_own_product(base, tmp_path):
    model = adapter(base, tmp_path / "ours")
    wanted = products(model)
    tensors = load_file(to_per_expert(tmp_path / "ours", tmp_path / "old", "mixtral") / WEIGHTS)
    config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    assert not config["rank_pattern"] and config["target_parameters"] is None
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"}
    for e in range(E):
        part = {}
        for layer in ("w1", "w2", "w3"):
            a, b = (tensors[f"{ROOT}block_sparse_moe.experts.{e}.{layer}.lora_{k}.weight"] for k in "AB")
            assert a.shape == (R, I if layer == "w2" else H) and b.shape == (H if layer == "w2" else I, R)
            part[layer] = (b * scaling) @ a
        assert torch.equal(torch.cat([part["w1"], part["w3"]]), wanted[1, "gate_up_proj"][e])
        assert torch.equal(part["w2"], wanted[1, "down_proj"][e])
    sizes = [wanted[1, "down_proj"][e].norm() for e in range(E)]
    assert all(b > 1.1 * a for a, b in itertools.pairwise(sizes)), "experts must be told apart by their size"
    assert f"{ROOT}block_sparse_moe.gate.lora_A.weight" in tensors and not any(".mlp." in k for k in tensors)


def test_the_way_back_gives_the_same_file(base, tmp_path):
    adapter(base, tmp_path / "ours")
    to_per_expert(tmp_path / "ours", tmp_path / "old", "mixtral")
    from_per_expert(tmp_path / "old", tmp_path / "back")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "back")]
    for config in configs:
        for targets in ("target_modules", "target_parameters"):
            config[targets] = sorted(config[targets])
    assert configs[0] == configs[1]


def test_stock_peft_reads_the_old_naming_as_the_same_adapter(base, tmp_path):
    """PEFT brings a converter of its own for adapters of transformers 4: an independent reader of what is written here."""
    adapter(base, tmp_path / "ours")
    to_per_expert(tmp_path / "ours", tmp_path / "old", "mixtral")
    torch.testing.assert_close(stock_logits(base, tmp_path / "old"), stock_logits(base, tmp_path / "ours"), rtol=1e-4, atol=1e-4)


def old_adapter(folder, seed=0, rslora=False, alpha=8):
    """An adapter as PEFT wrote it with transformers 4: three linear layers an expert, each with an A of its own."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        block = f"base_model.model.model.layers.{layer}.block_sparse_moe."
        for e in range(E):
            for name, (out, inner) in {"w1": (I, H), "w2": (H, I), "w3": (I, H)}.items():
                tensors[f"{block}experts.{e}.{name}.lora_A.weight"] = torch.randn(R, inner, generator=g) * 0.05
                tensors[f"{block}experts.{e}.{name}.lora_B.weight"] = torch.randn(out, R, generator=g) * 0.05 * (e + 1)
        tensors[f"{block}gate.lora_A.weight"] = torch.randn(R, H, generator=g) * 0.05
        tensors[f"{block}gate.lora_B.weight"] = torch.randn(E, R, generator=g) * 0.05
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": alpha, "lora_dropout": 0.05,
              "target_modules": ["w1", "w2", "w3", "gate"], "use_rslora": rslora, "bias": "none"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("rslora", [False, True])
def test_an_old_adapter_loads_here_with_its_own_products(base, tmp_path, rslora):
    tensors = old_adapter(tmp_path / "old", rslora=rslora)
    from_per_expert(tmp_path / "old", tmp_path / "new")
    model = qlora.load_lora(load_4bit(base, dtype="float32"), tmp_path / "new").eval()
    scaling = 8 / (R**0.5 if rslora else R)
    found = products(model)
    for layer in range(2):
        block = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts."
        for e in range(E):
            w1, w2, w3 = (
                scaling * tensors[f"{block}{e}.{n}.lora_B.weight"] @ tensors[f"{block}{e}.{n}.lora_A.weight"]
                for n in ("w1", "w2", "w3")
            )
            torch.testing.assert_close(found[layer, "gate_up_proj"][e], torch.cat([w1, w3]), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(found[layer, "down_proj"][e], w2, rtol=1e-5, atol=1e-7)
    if not rslora:  # PEFT doubles alpha with the rank, which is off by √2 for rank-stabilised LoRA
        old, new = write_without_dropout(tmp_path / "old"), tmp_path / "new"
        torch.testing.assert_close(stock_logits(base, new), stock_logits(base, old), rtol=1e-4, atol=1e-4)


def write_without_dropout(folder):
    """Stock PEFT refuses dropout on parameters, so it cannot read an old adapter that was trained with it."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": 0.0}))
    return folder


def test_an_old_adapter_survives_the_round_trip_bit_for_bit(tmp_path):
    tensors = old_adapter(tmp_path / "old")
    from_per_expert(tmp_path / "old", tmp_path / "new")
    back = load_file(to_per_expert(tmp_path / "new", tmp_path / "back", "mixtral") / WEIGHTS)
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in tensors)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (R, 8, {}, {})
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["rank_pattern"] == {"gate_up_proj": 2 * R}


def test_load_lora_takes_the_old_naming_directly(base, tmp_path):
    old_adapter(tmp_path / "old")
    from_per_expert(tmp_path / "old", tmp_path / "new")
    with torch.no_grad():
        direct, converted = (
            qlora.load_lora(load_4bit(base, dtype="float32"), tmp_path / name).eval()(IDS).logits for name in ("old", "new")
        )
    torch.testing.assert_close(direct, converted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("only", experts.STACKS)
def test_an_adapter_on_one_stack_only(base, tmp_path, only):
    from peft import LoraConfig, get_peft_model

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(plain, LoraConfig(r=R, target_modules=[], target_parameters=[f"mlp.experts.{only}"]))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.05)
    model.save_pretrained(str(tmp_path / "ours"))
    tensors = load_file(to_per_expert(tmp_path / "ours", tmp_path / "old", "qwen2_moe") / WEIGHTS)
    names = NAMINGS["qwen2_moe"]
    layers = {key.split(".")[-3] for key in tensors}
    assert layers == ({names.gate, names.up} if only == "gate_up_proj" else {names.down})
    from_per_expert(tmp_path / "old", tmp_path / "back")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_the_names_are_those_of_the_librarys_own_conversion():
    """transformers keeps the old names in its conversion of checkpoints; the table here must agree with it."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for kind, names in NAMINGS.items():
        sources, renamed = {}, {}
        for step in get_checkpoint_conversion_mapping(kind):
            if hasattr(step, "operations"):
                sources[step.target_patterns[0].rpartition(".")[2]] = [p.split(".")[-2] for p in step.source_patterns]
            else:
                renamed[step.target_patterns[0].strip(".")] = step.source_patterns[0].strip(".")
        assert sources == {"gate_up_proj": [names.gate, names.up], "down_proj": [names.down]}, kind
        assert renamed.get("mlp", "mlp") == names.block, kind
        assert renamed.get(f"{names.router_now}.weight", "gate.weight") == "gate.weight", kind


@knows_routers
@pytest.mark.parametrize("kind", NAMINGS)
def test_every_name_is_one_of_the_familys_own_checkpoint(tmp_path, kind):
    """What other software reads is the checkpoint in its original layout, which transformers still writes."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny(kind)).save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # shared experts and dense layers that PEFT cannot adapt
        model = qlora.add_lora(load_4bit(tmp_path / "base", dtype="float32"), r=R, dropout=0.0).eval()
    with torch.no_grad():
        for p in (p for n, p in model.named_parameters() if ".lora_B" in n):
            p.normal_(std=0.1)
    qlora.save_lora(model, tmp_path / "ours")
    file = load_file(to_per_expert(tmp_path / "ours", tmp_path / "old", kind) / WEIGHTS)
    layers = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in file}
    stored = {key.removesuffix(".weight") for key in load_file(tmp_path / "base" / "model.safetensors")}
    assert layers <= stored and any(layer.endswith(".gate") for layer in layers) and any(".experts.3." in n for n in layers)
    again = qlora.load_lora(load_4bit(tmp_path / "base", dtype="float32"), tmp_path / "old").eval()
    with torch.no_grad():
        ids = IDS % 128
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


# How PEFT finds a layer's rank and alpha: by regular expressions on names, and names are what changes.
OLD_PATTERNS = [
    {"w1": 16, "w3": 16},
    {"gate": 16},
    {"block_sparse_moe.gate": 16},
    {r"experts\.\d+\.w2": 64},
    {r"layers\.0\.block_sparse_moe\.experts\.\d+\.w2": 64},
    {r"layers\.1\..*": 2},
]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alphas", OLD_PATTERNS)
def test_alphas_by_pattern_follow_their_layers(base, tmp_path, alphas, rslora):
    """Against W + s·B·A in float64, with s by PEFT's rule on the old names; through the file, and loaded directly."""
    tensors = old_adapter(tmp_path / "old", rslora=rslora)
    file = tmp_path / "old" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": alphas}))
    from_per_expert(tmp_path / "old", tmp_path / "new")
    for folder in ("new", "old"):
        model = qlora.load_lora(load_4bit(base, dtype="float32"), tmp_path / folder).eval()
        found = products(model) | {
            (int(n.split(".")[4]), "gate"): m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight
            for n, m in model.named_modules()
            if isinstance(m, qlora.ParamWrapper) and m._param_ndim == 2
        }
        for layer in range(2):
            block = f"model.layers.{layer}.block_sparse_moe."

            def product(name, block=block):
                key = f"base_model.model.{block}{name}.lora_"
                matching = [a for pattern, a in alphas.items() if re.fullmatch(rf"(.*\.)?({pattern})", block + name)]
                scale = (matching or [8])[0] / (R**0.5 if rslora else R)
                return scale * tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double()

            wanted = {"gate": product("gate")}
            wanted["down_proj"] = torch.stack([product(f"experts.{e}.w2") for e in range(E)])
            halves = ([product(f"experts.{e}.{w}") for w in ("w1", "w3")] for e in range(E))
            wanted["gate_up_proj"] = torch.stack([torch.cat(pair) for pair in halves])
            for name, value in wanted.items():
                torch.testing.assert_close(found[layer, name].double(), value, rtol=1e-5, atol=1e-6, msg=f"{folder} {name}")
    back = load_file(to_per_expert(tmp_path / "new", tmp_path / "back", "mixtral") / WEIGHTS)
    assert all(torch.equal(back[k], tensors[k]) for k in tensors)
    from_per_expert(tmp_path / "back", tmp_path / "again")
    configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("new", "again")]
    assert all(configs[0][k] == configs[1][k] for k in ("rank_pattern", "alpha_pattern", "r", "lora_alpha"))


@pytest.mark.parametrize("ranks", [{"w2": 2}, {"gate": 2}, {"w1": 2, "w3": 2}])
def test_ranks_by_pattern_follow_their_layers(base, tmp_path, ranks):
    tensors = old_adapter(tmp_path / "old")
    for key, value in tensors.items():
        if any(f".{leaf}.lora_" in key for leaf in ranks):
            tensors[key] = value[:2].contiguous() if ".lora_A" in key else value[:, :2].contiguous()
    save_file(tensors, tmp_path / "old" / WEIGHTS)
    file = tmp_path / "old" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rank_pattern": ranks, "lora_dropout": 0.0}))
    from_per_expert(tmp_path / "old", tmp_path / "new")
    model = qlora.load_lora(load_4bit(base, dtype="float32"), tmp_path / "new").eval()
    stock_logits(base, tmp_path / "new")  # loads
    back = load_file(to_per_expert(tmp_path / "new", tmp_path / "back", "mixtral") / WEIGHTS)
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in tensors)
    key = f"{ROOT}block_sparse_moe.experts.3.w2.lora_"
    wanted = 8 / ranks.get("w2", R) * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
    torch.testing.assert_close(products(model)[1, "down_proj"][3], wanted, rtol=1e-5, atol=1e-7)


NEW_PATTERNS = [
    ("rank_pattern", {"mlp.experts.gate_up_proj": 2}),
    ("rank_pattern", {"mlp.gate.weight": 2}),
    ("alpha_pattern", {"mlp.experts.down_proj": 32}),
    ("alpha_pattern", {"gate.weight": 32}),
    ("alpha_pattern", {"gate": 32}),  # is no name of anything that is adapted
    ("alpha_pattern", {"layers.0.mlp.experts.gate_up_proj": 32}),
    ("alpha_pattern", {r"layers\.1\..*": 32}),
]


@pytest.mark.parametrize("kind, pattern", NEW_PATTERNS)
def test_patterns_of_todays_names_survive_the_way_to_the_old_ones(base, tmp_path, kind, pattern):
    """Against stock PEFT's logits with the adapter as it was."""
    from peft import LoraConfig, get_peft_model

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a pattern that matches nothing
        config = LoraConfig(r=R, lora_alpha=8, target_modules=["q_proj"], target_parameters=targets, **{kind: pattern})
        model = get_peft_model(plain, config).eval()
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        wanted, bare = model(IDS).logits, stock_base(base)
    model.save_pretrained(str(tmp_path / "new"))
    to_per_expert(tmp_path / "new", tmp_path / "old", "mixtral")
    from_per_expert(tmp_path / "old", tmp_path / "back")
    assert (wanted - bare).abs().max() > 0.1
    torch.testing.assert_close(stock_logits(base, tmp_path / "back"), wanted, rtol=1e-4, atol=1e-4)


def test_a_pattern_that_does_nothing_is_said_and_one_that_does_is_not(base, tmp_path):
    """PEFT says it of every pattern for a parameter, so its own words are of no use here."""
    adapter(base, tmp_path / "ours")
    file = tmp_path / "ours" / "adapter_config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    works_on = {"gate.weight": True, "mlp.experts.down_proj": True, "q_proj": True, "gate": False, "w1": False}
    for pattern, works in works_on.items():
        file.write_text(json.dumps(facts | {"alpha_pattern": {pattern: 32}}), encoding="utf-8")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = qlora.load_lora(load_4bit(base, dtype="float32"), tmp_path / "ours")
        said = [str(w.message) for w in caught if "pattern" in str(w.message)]
        words = f"the pattern {pattern!r} of the adapter's settings matches nothing, so it does nothing"
        assert said == ([] if works else [words])
        scalings = {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)}
        assert (32 / R in scalings) == works


def stock_base(base):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()(IDS).logits


def test_what_one_stack_cannot_hold_is_refused(tmp_path):
    old_adapter(tmp_path / "old")
    file = tmp_path / "old" / "adapter_config.json"
    for pattern in ({"w1": 16}, {"layers.0.block_sparse_moe.experts.0.w1": 64}):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": pattern}))
        with pytest.raises(ValueError, match=r"experts that become model\.layers\.\d\.mlp\.experts\.gate_up_proj have different"):
            from_per_expert(tmp_path / "old", tmp_path / "new")
    with pytest.raises(ValueError, match="how a jamba's experts were called"):
        to_per_expert(tmp_path / "old", tmp_path / "new", "jamba")


MLP = ("gate_proj", "up_proj", "down_proj")


def old_layers(name, weight):
    """The layers of transformers 4 that a weight is made of, expert by expert, gate before up."""
    path, _, leaf = name.removesuffix(".weight").rpartition(".")
    if weight.ndim == 3:
        parts = MLP[:2] if leaf == "gate_up_proj" else (leaf,)
        return [[f"{path}.{e}.{part}" for part in parts] for e in range(len(weight))]
    return [[f"{path}.{leaf}"]] if leaf in MLP else []


@knows_routers
@pytest.mark.parametrize("kind, shared", [("qwen2_moe", "shared_expert"), ("deepseek_v3", "shared_experts")])
def test_shared_experts_and_dense_layers_keep_their_adapters(tmp_path, kind, shared):
    """They have the names of single experts' layers. Against the weights with s·B·A added by hand, in a plain model."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny(kind)).eval()
    plain.save_pretrained(tmp_path / "base")
    tensors = {}
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            for matrix, parts in zip(weight if weight.ndim == 3 else [weight], old_layers(name, weight), strict=False):
                for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                    a, b = torch.randn(R, rows.shape[1]) * 0.1, torch.randn(len(rows), R) * 0.1
                    tensors |= {f"base_model.model.{part}.lora_{k}.weight": f for k, f in zip("AB", (a, b), strict=True)}
                    rows += 8 / R * b @ a
    (tmp_path / "old").mkdir()
    save_file(tensors, tmp_path / "old" / WEIGHTS)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": 8, "target_modules": list(MLP)}
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config))
    file = load_file(from_per_expert(tmp_path / "old", tmp_path / "new") / WEIGHTS)
    assert any(f".{shared}." in key for key in file)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "new")).eval()
    ours = qlora.load_lora(load_4bit(tmp_path / "base", dtype="float32"), tmp_path / "new")
    for model in (stock, ours):
        loaded = get_peft_model_state_dict(model)
        assert set(loaded) == set(file) and all(torch.equal(loaded[k], file[k]) for k in file)
    with torch.no_grad():
        ids = IDS % 128
        torch.testing.assert_close(stock(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
        merged = merging.merge(ours, "float32")
        torch.testing.assert_close(ours.eval()(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    back = load_file(to_per_expert(tmp_path / "new", tmp_path / "back", kind) / WEIGHTS)
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in back)
    assert set(json.loads((tmp_path / "back" / "adapter_config.json").read_text())["target_modules"]) == set(MLP)


def test_the_training_dropout_goes_both_ways(base, tmp_path):
    """An old adapter has it in its configuration; here it lies beside one that says 0, as stock PEFT wants it."""
    old_adapter(tmp_path / "old")
    from_per_expert(tmp_path / "old", tmp_path / "new")
    to_per_expert(tmp_path / "new", tmp_path / "back", "mixtral")
    from_per_expert(tmp_path / "back", tmp_path / "again")
    for name in ("new", "back", "again"):
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["lora_dropout"] == 0.0
        model = qlora.load_lora(load_4bit(base, dtype="float32"), tmp_path / name, trainable=True)
        stacks = [m for m in model.modules() if isinstance(m, qlora.ParamWrapper) and m._param_ndim == 3]
        assert stacks and {m.expert_dropout["default"] for m in stacks} == {0.05}, name


def test_what_cannot_be_converted_is_said(base, tmp_path):
    tensors = old_adapter(tmp_path / "old")
    with pytest.raises(ValueError, match="nothing to convert"):
        to_per_expert(tmp_path / "old", tmp_path / "out", "mixtral")
    key = f"{ROOT}block_sparse_moe.experts.3.w1.lora_A.weight"
    save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / "old" / WEIGHTS)
    with pytest.raises(ValueError, match=r"no w1 adapter for experts \[3\]"):
        from_per_expert(tmp_path / "old", tmp_path / "out")
    save_file({k: v for k, v in tensors.items() if ".w3." not in k}, tmp_path / "old" / WEIGHTS)
    with pytest.raises(ValueError, match="both need an adapter"):
        from_per_expert(tmp_path / "old", tmp_path / "out")
    save_file({k: torch.cat([v, v]) if ".w2.lora_A" in k else v for k, v in tensors.items()}, tmp_path / "old" / WEIGHTS)
    with pytest.raises(ValueError, match="w2 has rank"):
        from_per_expert(tmp_path / "old", tmp_path / "out")
    adapter(base, tmp_path / "ours")
    with pytest.raises(ValueError, match="no adapter on single experts"):
        from_per_expert(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is written when something is wrong"


@pytest.mark.parametrize(
    "change, words",
    [({"use_dora": True}, "plain LoRA"), ({"lora_bias": True}, "plain LoRA"), ({"target_modules": r".*\.(w1|w2|w3)"}, "pattern")],
)
def test_other_kinds_of_adapters_are_refused(tmp_path, change, words):
    old_adapter(tmp_path / "old")
    file = tmp_path / "old" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        from_per_expert(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_fresh_adapter_keeps_its_rank(base, tmp_path):
    from helpers import qlora
    from helpers.quantization import load_4bit

    qlora.save_lora(qlora.add_lora(load_4bit(base, dtype="float32"), r=R, dropout=0.0), tmp_path / "new")  # B is 0
    tensors = load_file(to_per_expert(tmp_path / "new", tmp_path / "old", "mixtral") / WEIGHTS)
    assert {tensors[f"{ROOT}block_sparse_moe.experts.0.{w}.lora_A.weight"].shape[0] for w in ("w1", "w2", "w3")} == {R}
