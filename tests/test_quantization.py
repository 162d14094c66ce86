"""Loading in 4 bit: what the audit sees, what it refuses, and that saving loses nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnbf
import pytest
import torch
from bitsandbytes.nn import Params4bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from helpers import checkpoints, experts, nf4, qlora, quantization
from helpers.audit import Audit, audit, router_modules
from helpers.quantization import load_4bit, random_4bit, save_4bit
from helpers.tiny import tiny_config
from tests.moe_families import knows_routers, tiny

IDS = torch.arange(3, 43).view(2, 20)
ROOT = Path(__file__).resolve().parent.parent


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


def state_tensors(weight):
    """Everything that a packed weight is made of."""
    return [weight.data, *weight.quant_state.as_dict(packed=True).values()]


def write_original(folder, tensors, shards=3):
    """A checkpoint in Mixtral's original layout (one matrix per expert: w1, w2, w3), written by hand, in shards."""
    flat = {}
    for name, value in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            place = name.replace(".mlp.", ".block_sparse_moe.").removesuffix("gate_up_proj")
            for e, matrix in enumerate(value):
                gate, up = matrix.chunk(2)
                flat[f"{place}{e}.w1.weight"], flat[f"{place}{e}.w3.weight"] = gate.clone(), up.clone()
        elif name.endswith("experts.down_proj"):
            place = name.replace(".mlp.", ".block_sparse_moe.").removesuffix("down_proj")
            flat |= {f"{place}{e}.w2.weight": matrix.clone() for e, matrix in enumerate(value)}
        elif name != "lm_head.weight":  # tied
            flat[name.replace(".mlp.", ".block_sparse_moe.")] = value.clone()
    files = [f"model-{n:05}-of-{shards:05}.safetensors" for n in range(1, shards + 1)]
    names = sorted(flat)  # neighbours: a layer's experts lie in several shards
    where = {name: files[min(k * shards // len(names), shards - 1)] for k, name in enumerate(names)}
    for file in files:
        save_file({n: flat[n] for n in names if where[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


@pytest.fixture(scope="module")
def layouts(random_mixtral, tmp_path_factory):
    """The same model in the original layout written by hand, in transformers' own per-expert files, and fused."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("original", "saved", "fused")}
    plain = AutoModelForCausalLM.from_pretrained(random_mixtral, dtype=torch.float32)
    plain.save_pretrained(folders["saved"], max_shard_size="200KB")
    plain.save_pretrained(folders["fused"], save_original_format=False, max_shard_size="200KB")
    write_original(folders["original"], plain.state_dict())
    shutil.copy(folders["fused"] / "config.json", folders["original"])
    return folders


def test_every_layout_of_a_checkpoint_gives_the_same_bits(layouts):
    assert all(len(list(folder.glob("*.safetensors"))) > 1 for folder in layouts.values()), "all are sharded"
    with safe_open(next(layouts["fused"].glob("*.safetensors")), "pt") as shard:
        assert not any(".w1." in key for key in shard.keys())  # noqa: SIM118
    models = [load_4bit(folder, dtype="float32") for folder in layouts.values()]
    for name, param in models[0].named_parameters():
        for other in models[1:]:
            twin = other.get_parameter(name)
            if isinstance(param, Params4bit):
                assert all(torch.equal(a, b) for a, b in zip(state_tensors(param), state_tensors(twin), strict=True)), name
            else:
                assert torch.equal(param, twin), name


def test_codes_and_scales_are_those_of_every_expert_alone(layouts):
    model = load_4bit(layouts["original"], dtype="float32", double_quant=False)
    plain = AutoModelForCausalLM.from_pretrained(layouts["fused"], dtype=torch.float32)
    for (packed, name), (module, _) in zip(stacks(model), stacks(plain), strict=True):
        weight = getattr(packed, name)
        count = len(getattr(module, name))
        for e, matrix in enumerate(getattr(module, name).data):
            codes, state = bnbf.quantize_4bit(matrix.contiguous(), blocksize=64, quant_type="nf4")
            assert torch.equal(codes.flatten(), weight.data.view(count, -1)[e])
            assert torch.equal(state.absmax, weight.quant_state.absmax.view(count, -1)[e])


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
    router.weight = nf4.quantize_stack(torch.randn(1, 64, 64))
    assert any("router is 4-bit" in p for p in audit(model).problems)


def test_logits_equal_those_of_the_dequantised_model(random_mixtral):
    model = load_4bit(random_mixtral, dtype="float32").eval()
    plain = AutoModelForCausalLM.from_pretrained(random_mixtral, dtype=torch.float32).eval()
    with torch.no_grad():
        for (packed, name), (module, _) in zip(stacks(model), stacks(plain), strict=True):
            getattr(module, name).copy_(nf4.dequantize_stack(getattr(packed, name)))
        for name, param in plain.named_parameters():
            twin = model.get_parameter(name)
            if isinstance(twin, Params4bit) and param.ndim == 2:
                param.copy_(bnbf.dequantize_4bit(twin.data, twin.quant_state))
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)


def test_save_and_reload_is_bit_identical_and_small(random_mixtral, tmp_path):
    model = load_4bit(random_mixtral, dtype="float32").eval()
    save_4bit(model, tmp_path)
    again = load_4bit(tmp_path).eval()  # without being told in what it was made
    assert {p.dtype for p in again.parameters() if p.is_floating_point()} == {torch.float32}
    for (a, name), (b, _) in zip(stacks(model), stacks(again), strict=True):
        assert torch.equal(getattr(a, name).data, getattr(b, name).data)
        assert torch.equal(nf4.dequantize_stack(getattr(a, name)), nf4.dequantize_stack(getattr(b, name)))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json"}, "safetensors only"


def test_a_saved_model_computes_in_the_dtype_that_is_asked_for(random_mixtral, tmp_path):
    made = load_4bit(random_mixtral, dtype="float32").eval()
    save_4bit(made, tmp_path)
    asked = load_4bit(tmp_path, dtype="bfloat16").eval()
    states = [p.quant_state.dtype for p in asked.parameters() if isinstance(p, Params4bit)]
    assert len(states) > 10 and set(states) == {torch.bfloat16}
    assert {p.dtype for p in asked.parameters() if p.is_floating_point()} == {torch.bfloat16}
    with torch.no_grad():
        wanted, got = made(IDS).logits, asked(IDS).logits
    assert got.dtype == torch.bfloat16 and (got.float() - wanted).norm() < 0.03 * wanted.norm(), "the same weights, less exactly"


def test_a_saved_model_is_sharded_and_small_and_comes_back_bit_for_bit(random_mixtral, tmp_path):
    model = load_4bit(random_mixtral, dtype="float32")
    save_4bit(model, tmp_path, max_shard_size="60KB")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and (tmp_path / "model.safetensors.index.json").is_file()
    stored = {k: v for file in files for k, v in load_file(file).items() if ".experts." in k}
    size = sum(v.numel() * v.element_size() for v in stored.values())
    weights = audit(model).parts["experts"].weights
    assert 0.5 < size / weights < 0.6, f"{size / weights:.3f} bytes per expert weight"
    again = load_4bit(tmp_path, dtype="float32")
    for name, param in model.named_parameters():
        twin = again.get_parameter(name)
        if isinstance(param, Params4bit):
            assert all(torch.equal(a, b) for a, b in zip(state_tensors(param), state_tensors(twin), strict=True)), name
        else:
            assert torch.equal(param, twin), name


# ------------------------------------------------------------------------------------- checkpoints that are not whole


@pytest.fixture(params=["original", "fused", "packed"])
def checkpoint(request, layouts, random_mixtral, tmp_path):
    """A copy of a good sharded checkpoint, to be damaged."""
    if request.param == "packed":
        save_4bit(load_4bit(random_mixtral, dtype="float32"), tmp_path / "model", max_shard_size="60KB")
    else:
        shutil.copytree(layouts[request.param], tmp_path / "model")
    return tmp_path / "model"


def shard_with(folder, part):
    """(file, name) of the first tensor with `part` in its name."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return next((folder / file, name) for name, file in sorted(index.items()) if part in name)


@pytest.mark.parametrize(
    "place, said",
    [
        ("nowhere", "there is no folder .*nowhere, and a Hub id has the form ORG/NAME"),
        ("empty", r"empty holds no weights \(model.safetensors or model.safetensors.index.json\): fetch or copy them there"),
    ],
)
def test_a_place_without_a_model_is_one_clear_error(place, said, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=said):
        load_4bit(tmp_path / place, dtype="float32")


@pytest.mark.parametrize("name", ["./mixtral", "~/mixtral", "models/big/mixtral"])
def test_what_looks_like_a_folder_is_not_looked_for_on_the_hub(name):
    with pytest.raises(OSError, match=f"there is no folder {name.removeprefix('./')}, and a Hub id"):
        load_4bit(name)


@pytest.mark.parametrize("left", [0, 7, 100, -100])
def test_a_truncated_shard_is_one_clear_error(checkpoint, left):
    file, _ = shard_with(checkpoint, ".experts.")
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    with pytest.raises(OSError, match=f"{file.name} is cut off or damaged"):
        load_4bit(checkpoint, dtype="float32")


def test_a_missing_shard_is_one_clear_error(checkpoint):
    file, _ = shard_with(checkpoint, ".experts.")
    file.unlink()
    with pytest.raises(OSError, match=file.name):
        load_4bit(checkpoint, dtype="float32")


@pytest.mark.parametrize("part", ["experts.", "q_proj", "embed_tokens", "input_layernorm"])
def test_a_missing_tensor_is_one_clear_error(checkpoint, part):
    """transformers would draw it at random, with a warning."""
    file, name = shard_with(checkpoint, part)
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{file.name} in .* lacks {name}"):
        load_4bit(checkpoint, dtype="float32")
    index = checkpoint / "model.safetensors.index.json"  # and when the index does not promise it either
    content = json.loads(index.read_text())
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"does not fit the model: .*{name}.* is missing"):
        load_4bit(checkpoint, dtype="float32")


@pytest.mark.parametrize("place", range(4))
def test_a_shard_with_a_wrong_shape_is_one_clear_error(checkpoint, place, request):
    """transformers checks no shapes of quantised weights: a wrong one is loaded, and fails or computes nonsense later."""
    single = "original" in request.node.callspec.id  # this layout has one matrix per expert
    stacks_there = [".experts.3.w1.", ".experts.3.w2."] if single else [".experts.gate_up_proj", ".experts.down_proj"]
    file, name = shard_with(checkpoint, [*stacks_there, "q_proj", "embed_tokens"][place])
    tensors = load_file(file)
    tensors[name] = tensors[name][: len(tensors[name]) // 2].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not fit the model") as error:
        load_4bit(checkpoint, dtype="float32")
    assert name in str(error.value) and file.name in str(error.value) and "has shape" in str(error.value)


def test_an_expert_that_is_missing_everywhere_is_named(layouts, tmp_path):
    shutil.copytree(layouts["original"], tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    for name in [n for n in index["weight_map"] if "layers.1." in n and ".experts.5." in n]:
        del index["weight_map"][name]
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in (tmp_path / "model").glob("*.safetensors"):
        tensors = {k: v for k, v in load_file(file).items() if not ("layers.1." in k and ".experts.5." in k)}
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.block_sparse_moe\.experts\.5\.w1\.weight is missing"):
        load_4bit(tmp_path / "model", dtype="float32")


def test_pickled_weights_are_not_read(random_mixtral, tmp_path):
    shutil.copytree(random_mixtral, tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_4bit(tmp_path / "model", dtype="float32")


def test_weights_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        nf4.quantize_stack(torch.full((2, 64, 64), float("nan")))


# ------------------------------------------------------------------------------------------------------ random weights


def test_random_weights_are_made_in_4_bit():
    config = tiny_config(256, hidden=128, layers=2, intermediate=192)
    model, twin, other = (random_4bit(config, "float32", seed=s) for s in (3, 3, 4))
    report = audit(model)
    assert report.ok and report.parts["experts"].four_bit == 2 * 8 * 3 * 128 * 192
    assert report.parts["experts"].bytes / report.parts["experts"].weights < 0.53
    for name, param in model.named_parameters():
        assert torch.equal(param, twin.get_parameter(name)), f"{name}: a seed gives the same weights"
    assert not torch.equal(model.model.layers[0].mlp.experts.down_proj, other.model.layers[0].mlp.experts.down_proj)
    for module, name in stacks(model):
        values = nf4.dequantize_stack(getattr(module, name))
        assert abs(values.std() / config.initializer_range - 1) < 0.02 and abs(values.mean()) < 0.1 * values.std()
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()


def test_a_random_model_saves_and_reloads_like_any_other(tmp_path):
    model = random_4bit(tiny_config(256, hidden=64, layers=1, intermediate=64), "float32").eval()
    save_4bit(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, load_4bit(tmp_path, dtype="float32").eval()(IDS).logits)


def test_the_real_mixtral_fits_by_count():
    """Random Mixtral-8x7B would take 23 GiB; the same code path, counted on the shapes alone."""
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.device("meta"):
        plain = MixtralForCausalLM(MixtralConfig())
    packed = sum(p.numel() for n, p in plain.named_parameters() if ".experts." in n or "_proj" in n)
    rest = sum(p.numel() for p in plain.parameters()) - packed
    assert 22.5 < (packed * 4.127 / 8 + rest * 2) / 2**30 < 23.5


MEASURE = """
import ctypes, gc, json, sys, threading, time
import torch

torch.set_num_threads(1)
from helpers import environment
from helpers.audit import audit
from helpers.quantization import load_4bit, random_4bit
from transformers import AutoConfig

environment.quiet()
folder, warm = sys.argv[1:3]


def make(what, folder):
    return random_4bit(AutoConfig.from_pretrained(folder)) if what == "random" else load_4bit(folder, dtype=what)


def resident():
    # of this process alone: pages of the mapped checkpoint can be dropped at any time and do not count
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))


def watch():
    global peak
    while not done.is_set():
        peak = max(peak, resident())
        time.sleep(0.0005)


for what in sys.argv[3:]:
    make(what, warm)  # imports, and what libraries allocate once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, done = resident(), 0, threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = make(what, folder)
    done.set()
    watcher.join()
    size = sum(r["MiB"] for r in audit(model).table if r["part"] == "all")
    print(json.dumps({"what": what, "size": size, "peak": (peak - before) / 2**20}))
    del model
"""


@pytest.fixture(scope="module")
def middle_sized(tmp_path_factory):
    """112 M parameters in bf16, one matrix per expert, ten shards; and a tiny one."""
    folders = [tmp_path_factory.mktemp(name) for name in ("middle", "tiny")]
    generator = torch.Generator().manual_seed(0)
    for folder, config in zip(folders, (tiny_config(2048, 512, 5, 1792), tiny_config(256, 64, 1, 64)), strict=True):
        config.architectures = ["MixtralForCausalLM"]
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(config).state_dict()
        tensors = {k: torch.randn(v.shape, generator=generator).mul_(0.02).bfloat16() for k, v in shapes.items()}
        write_original(folder, tensors, shards=10)
        config.save_pretrained(folder)
    return folders


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kinds", [["random", "bfloat16"], ["float32"]], ids="-".join)
def test_peak_memory_is_the_4_bit_model_and_two_of_its_largest_tensors(middle_sized, kinds):
    """Measured beyond the model: 1.3 to 1.6 (bf16) and 2.1 (fp32) of the largest tensor, 0.1 for random weights.

    The slack is for memory that malloc has been given back and keeps.
    """
    command = [sys.executable, "-c", MEASURE, *map(str, middle_sized), *kinds]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(kinds)
    for found in map(json.loads, lines):
        largest = 8 * 2 * 1792 * 512 * (4 if found["what"] == "float32" else 2) / 2**20  # gate and up of one layer, unquantised
        assert found["peak"] >= 0.8 * found["size"], "the measurement saw the model"
        assert found["peak"] <= found["size"] + (0 if found["what"] == "random" else 2) * largest + 24, found


# -------------------------------------------------------------------------------------------------------------- audit


def test_the_audit_names_adapters_as_a_part_of_their_own(random_mixtral):
    from helpers import qlora

    model = qlora.add_lora(load_4bit(random_mixtral, dtype="float32"), r=4)
    report = audit(model)
    assert report.ok and report.parts["adapters"].four_bit == 0
    assert report.parts["adapters"].weights == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.parts["adapters"].bytes == 4 * report.parts["adapters"].weights
    bare = audit(load_4bit(random_mixtral, dtype="float32"))
    assert {k: (v.weights, v.bytes) for k, v in report.parts.items() if k != "adapters"} == {
        k: (v.weights, v.bytes) for k, v in bare.parts.items()
    }


def test_the_audits_bytes_are_those_of_the_tensors(random_mixtral):
    """Counted from the saved file, which holds every tensor of the model once."""
    model = load_4bit(random_mixtral, dtype="float32")
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied
    blobs = [v for k, v in state.items() if "bitsandbytes__nf4" in k]  # a description in JSON, no weights
    size = sum(v.numel() * v.element_size() for v in state.values()) - sum(v.numel() for v in blobs)
    offsets = sum(4 for p in model.parameters() if isinstance(p, Params4bit))  # in the description when saved
    assert audit(model).table[-1]["MiB"] * 2**20 == size + offsets


def test_the_audit_catches_an_unquantised_model_and_an_unquantised_projection(random_mixtral):
    plain = AutoModelForCausalLM.from_pretrained(random_mixtral, dtype=torch.float32)
    assert any("weights of attention are not 4-bit" in p for p in audit(plain).problems)
    model = load_4bit(random_mixtral, dtype="float32")
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 64, bias=False)
    assert audit(model).problems == ("4,096 of 24,576 weights of attention are not 4-bit",)


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
    with pytest.raises(ValueError, match="no experts found"):
        load_4bit(tmp_path, dtype="float32")


def test_a_model_whose_routers_nobody_names_is_refused(random_mixtral, monkeypatch):
    """Some families' routers are ordinary linear layers: unknown, they would be packed without a word."""
    from helpers import audit as audits

    known = load_4bit(random_mixtral, dtype="float32")
    monkeypatch.setattr(audits, "router_recorders", lambda model: [])
    with pytest.raises(ValueError, match="does not say which of its modules are routers"):
        load_4bit(random_mixtral, dtype="float32")
    assert not audit(known).ok and "routers" in audit(known).problems[-1]


def test_olmoe_loads_too(tmp_path):
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        num_experts=16, num_experts_per_tok=8,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(tmp_path)
    report = audit(load_4bit(tmp_path, dtype="float32"))
    assert report.ok and report.parts["experts"].four_bit == 16 * 3 * 64 * 64


def test_the_identity_of_a_checkpoint_notices_every_tensor(random_mixtral, tmp_path):
    from helpers.checkpoints import identity

    tensors = load_file(random_mixtral / "model.safetensors")
    (tmp_path / "config.json").write_bytes((random_mixtral / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    first = identity(tmp_path)
    found = {first}
    for name in tensors:
        changed = tensors | {name: tensors[name] + 1e-3}
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        found.add(identity(tmp_path))
    assert len(found) == 1 + len(tensors)


def test_random_weights_leave_the_random_state_alone():
    from helpers.tiny import tiny_config

    torch.manual_seed(3)
    state = torch.get_rng_state()
    random_4bit(tiny_config(64, hidden=64, layers=1, intermediate=64), "float32")
    assert torch.equal(torch.get_rng_state(), state)


def test_no_weight_is_repacked_on_any_cpu(random_mixtral):
    from bitsandbytes.nn import Linear4bit

    model = load_4bit(random_mixtral)
    assert not any(m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, Linear4bit))


def test_a_checkpoint_of_another_quantisation_is_refused(random_mixtral, tmp_path):
    shutil.copytree(random_mixtral, tmp_path / "bnb")
    file = tmp_path / "bnb" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another method"):
        load_4bit(tmp_path / "bnb")


def test_a_model_that_fails_the_audit_is_not_handed_out(random_mixtral, monkeypatch):
    real = quantization.audit
    monkeypatch.setattr(quantization, "audit", lambda model: dataclasses.replace(real(model), problems=("experts in bf16",)))
    with pytest.raises(RuntimeError, match="audit failed: experts in bf16"):
        load_4bit(random_mixtral)


def test_the_headers_are_those_of_the_asked_revision(random_mixtral, monkeypatch):
    asked, real = [], checkpoints.read_headers
    monkeypatch.setattr(checkpoints, "read_headers", lambda path, **hub: (asked.append(hub), real(path))[1])
    load_4bit(random_mixtral, revision="main")
    assert asked == [{"revision": "main"}]


def test_an_audit_of_nothing_says_its_problem():
    with pytest.raises(RuntimeError, match="audit failed: no experts"):
        Audit({}, ("no experts",)).check()


# ------------------------------------------------------------------------------------------ checkpoints that are not right


def test_a_model_is_saved_whole_into_a_folder_of_its_own(random_mixtral, tmp_path, monkeypatch):
    model = load_4bit(random_mixtral)
    save_4bit(model, tmp_path / "saved")
    with pytest.raises(FileExistsError, match=r"saved is not empty: write the model into another folder"):
        save_4bit(model, tmp_path / "saved", max_shard_size="20KB")
    (tmp_path / "empty").mkdir()
    save_4bit(model, tmp_path / "empty", max_shard_size="20KB")
    again = load_4bit(tmp_path / "empty")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))

    def interrupted(folder, **_):
        (folder / "model.safetensors").parent.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_4bit(model, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_a_model_with_adapters_is_not_saved_as_a_base(random_mixtral, tmp_path):
    model = qlora.add_lora(load_4bit(random_mixtral), r=2)
    for which in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="this model has adapters"):
            save_4bit(which, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("layer", ["mlp.experts.gate_up_proj", "self_attn.q_proj.weight"])
@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "quant_map", "nested_quant_map"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_packed_weights_without_their_scales_are_refused(random_mixtral, tmp_path, layer, part, damage):
    """bitsandbytes would take the codes of scales for scales, or read beyond them."""
    save_4bit(load_4bit(random_mixtral), tmp_path)
    file, key = tmp_path / "model.safetensors", f"model.layers.0.{layer}.{part}"
    tensors = load_file(file)
    tensors[key] = tensors[key][:-1].clone()
    if damage == "missing":
        del tensors[key]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit the model: .*(is missing|has shape)"):
        load_4bit(tmp_path)


def test_weights_that_are_no_real_numbers_are_refused(random_mixtral, tmp_path):
    shutil.copytree(random_mixtral, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if ".experts.3.w1" in k)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save_file(tensors | {key: tensors[key].to(dtype)}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"not one of plain weights: {re.escape(key)} in .* is (I8|F8_E4M3)"):
            load_4bit(tmp_path / "base")
    for name in (key, next(k for k in tensors if "q_proj" in k)):
        for value in (float("nan"), float("inf")):
            bad = tensors[name].clone()
            bad.view(-1)[5] = value
            save_file(tensors | {name: bad}, file, metadata={"format": "pt"})
            with pytest.raises((ValueError, RuntimeError), match=r"not finite"):
                load_4bit(tmp_path / "base")


def test_a_damaged_index_is_named_and_one_file_goes_before_an_index(random_mixtral, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(random_mixtral)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / "model.safetensors.index.json"
    whole = index.read_text(encoding="utf-8")
    for text in (whole[:100], "{}"):
        index.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged .*: fetch it again"):
            load_4bit(tmp_path)
    index.write_text(whole, encoding="utf-8")
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not fit the model"):  # what transformers would load
        load_4bit(tmp_path)


def test_what_cannot_be_chosen_is_refused_and_old_names_are_known(random_mixtral, tmp_path):
    assert load_4bit(random_mixtral, torch_dtype=torch.float16, use_safetensors=True).lm_head.weight.dtype == torch.float16
    with pytest.raises(ValueError, match="quantization_config: load_4bit always quantises to NF4"):
        load_4bit(random_mixtral, quantization_config=None)
    with pytest.raises(ValueError, match="safetensors only"):
        load_4bit(random_mixtral, use_safetensors=False)
    shutil.copytree(random_mixtral, tmp_path / "in" / "side")
    assert load_4bit(tmp_path / "in", subfolder="side").dtype == torch.bfloat16


@knows_routers
def test_the_language_model_of_a_model_with_pictures_is_loaded(tmp_path):
    """Qwen3.5-MoE's checkpoints are those of the whole model; stock transformers finds the language model in them, too."""
    text = tiny("qwen3_5_moe_text")
    sizes = dict(hidden_size=64, intermediate_size=64, num_heads=2, out_hidden_size=64, patch_size=4, num_position_embeddings=16)
    config = CONFIG_MAPPING["qwen3_5_moe"](text_config=text.to_dict(), vision_config=dict(depth=1, **sizes))
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config)
    whole.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = load_4bit(tmp_path, dtype="float32").eval()
    assert type(ours) is type(stock)
    ids = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (m(input_ids=ids, use_cache=False).logits for m in (stock, ours))
    assert (a - b).norm() < 0.3 * a.norm(), "NF4's own error, and not other weights"


def test_other_kinds_of_4_bit_are_named(random_mixtral):
    model = load_4bit(random_mixtral)
    model.model.layers[0].mlp.experts.down_proj.quant_state.quant_type = "fp4"
    report = audit(model)
    assert "fp4" in report.parts["experts"].dtypes.pop() + report.parts["experts"].dtypes.pop()
    assert any("down_proj is fp4, not nf4" in problem for problem in report.problems)


@knows_routers
def test_what_stays_in_16_bit_is_noted_when_it_is_much(monkeypatch, tmp_path):
    """Inkling's shared experts are parameters of three dimensions beside transformers' experts interface."""
    import helpers.audit

    monkeypatch.setattr(helpers.audit, "LEAST_BYTES", 0)
    with pytest.warns(UserWarning, match=r"matrices that cannot be packed here: .*shared_experts"):
        report = audit(random_4bit(tiny("inkling_text")))
    assert report.ok and "NOTE: " in str(report)
