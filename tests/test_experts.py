"""The 4-bit expert MLP against a float64 loop over dequantised experts, and its promise to keep no weights."""

from __future__ import annotations

import gc

import bitsandbytes.functional as bnbf
import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from helpers import experts
from helpers.quantization import load_4bit

E, H, I, R = 4, 64, 128, 3  # noqa: E741


def make(seed: int = 0, scale: float = 0.2, experts_count: int = E) -> tuple[MixtralExperts, MixtralExperts]:
    """(packed, dequantised float64 twin)."""
    torch.manual_seed(seed)
    config = MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=experts_count)
    config._experts_implementation = experts.NAME
    packed, twin = MixtralExperts(config), MixtralExperts(config)
    for name in experts.STACKS:
        weight = torch.randn_like(getattr(packed, name)) * scale
        setattr(packed, name, experts.quantize_stack(weight))
        setattr(twin, name, nn.Parameter(experts.dequantize_stack(getattr(packed, name)).double(), requires_grad=False))
    return packed, twin


def lora_factors(seed: int = 1, dtype=torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(E, R, H), (E, 2 * I, R), (E, R, I), (E, H, R)]
    return [(torch.randn(s, generator=g) * 0.3).to(dtype).requires_grad_() for s in shapes]


def reference(twin, x, index, weight, a1, b1, a2, b2):
    """Σ_k weight · down(silu(gate) · up), one token and one expert at a time, in plain autograd."""
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros(H, dtype=x.dtype)
        for k in range(index.shape[1]):
            e = int(index[t, k])
            h = (twin.gate_up_proj[e] + b1[e] @ a1[e]) @ x[t]
            a = nn.functional.silu(h[:I]) * h[I:]
            row = row + weight[t, k] * ((twin.down_proj[e] + b2[e] @ a2[e]) @ a)
        rows.append(row)
    return torch.stack(rows)


def attach(module, factors, dropout=0.0):
    a1, b1, a2, b2 = factors
    module.lora_factors = {
        "gate_up_proj": experts.Factors(a1, b1, dropout),
        "down_proj": experts.Factors(a2, b2, dropout),
    }


INDICES = {
    "top-1": torch.tensor([[0], [3], [1], [3], [2]]),
    "top-2": torch.tensor([[0, 1], [3, 2], [1, 0], [3, 1], [2, 3]]),
    "all to one": torch.full((5, 1), 2),
    "one token": torch.tensor([[1, 3]]),
    "every expert": torch.tensor([[0, 1, 2, 3]] * 3),
}


@pytest.mark.parametrize("name", INDICES)
def test_forward_and_every_gradient_equal_the_float64_loop(name):
    index = INDICES[name]
    packed, twin = make()
    torch.manual_seed(2)
    x = torch.randn(index.shape[0], H)
    weight = torch.rand(index.shape)
    inputs = [x.requires_grad_(), weight.requires_grad_(), *lora_factors()]
    attach(packed, inputs[2:])
    out = packed(x, index, weight)
    up = torch.randn_like(out)
    got = torch.autograd.grad((out * up).sum(), inputs)

    doubles = [v.detach().double().requires_grad_() for v in inputs]
    wanted_out = reference(twin, doubles[0], index, *doubles[1:])
    wanted = torch.autograd.grad((wanted_out * up.double()).sum(), doubles)
    torch.testing.assert_close(out.double(), wanted_out, rtol=1e-5, atol=1e-5)
    for g, w in zip(got, wanted, strict=True):
        assert (g.double() - w).norm() <= 2e-6 * w.norm() + 1e-9


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_low_precision_is_close(dtype, tolerance):
    packed, twin = make()
    for name in experts.STACKS:
        getattr(packed, name).quant_state.dtype = dtype
    index, x, weight = INDICES["top-2"], torch.randn(5, H), torch.rand(5, 2)
    factors = lora_factors()
    attach(packed, factors)
    out = packed(x.to(dtype), index, weight)
    assert out.dtype == dtype
    wanted = reference(twin, x.double(), index, weight.double(), *(f.double() for f in factors))
    assert (out.double() - wanted).norm() < tolerance * wanted.norm()


def test_without_adapters_it_is_the_stock_module_on_dequantised_weights():
    packed, twin = make()
    index, x, weight = INDICES["top-2"], torch.randn(5, H), torch.rand(5, 2)
    stock = MixtralExperts.forward.__wrapped__(twin.double(), x.double(), index, weight.double())
    torch.testing.assert_close(packed(x, index, weight).double(), stock, rtol=1e-5, atol=1e-5)


def test_unpacking_expert_by_expert_is_bitsandbytes_own_dequantisation():
    weight = torch.randn(E, 2 * I, H)
    packed = experts.quantize_stack(weight)
    whole = bnbf.dequantize_4bit(packed.data, packed.quant_state)
    assert torch.equal(experts.dequantize_stack(packed), whole.view(E, 2 * I, H))
    alone, state = bnbf.quantize_4bit(weight[2].contiguous(), blocksize=64, quant_type="nf4")
    assert torch.equal(alone.flatten(), packed.data.view(E, -1)[2]), "the codes of an expert do not depend on its neighbours"
    assert (experts.dequantize_stack(packed)[2] - bnbf.dequantize_4bit(alone, state)).abs().max() < 0.02


@pytest.mark.parametrize("k", range(1, 9))
def test_top_1_to_top_8(k):
    """Eight experts, each token's k chosen without repetition, in every dtype."""
    tokens, count = 6, 8
    torch.manual_seed(k)
    index = torch.stack([torch.randperm(count)[:k] for _ in range(tokens)])
    for dtype, tolerance in {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}.items():
        packed, twin = make(experts_count=count)
        for name in experts.STACKS:
            getattr(packed, name).quant_state.dtype = dtype
        shapes = [(tokens, H), (tokens, k), (count, R, H), (count, 2 * I, R), (count, R, I), (count, H, R)]
        inputs = [(torch.randn(s) * 0.3).to(dtype).requires_grad_() for s in shapes]
        doubles = [v.detach().double().requires_grad_() for v in inputs]
        attach(packed, inputs[2:])
        outs = packed(inputs[0], index, inputs[1]), reference(twin, doubles[0], index, *doubles[1:])
        pairs = [
            [out, *torch.autograd.grad(out.double().square().sum(), values)]
            for out, values in zip(outs, (inputs, doubles), strict=True)
        ]
        for got, wanted in zip(*pairs, strict=True):
            assert (got.double() - wanted).norm() < 3 * tolerance * wanted.norm()


def test_no_dequantised_weight_is_kept_for_backward():
    """Neither in autograd's list of saved tensors nor alive anywhere, after forward and after backward."""
    packed, _ = make()
    attach(packed, lora_factors())
    shapes = {(2 * I, H), (H, I), (E, 2 * I, H), (E, H, I)}
    gc.collect()
    before = {id(t) for t in living(shapes)}
    assert before, "the twin's weights must be seen"
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = packed(torch.randn(5, H, requires_grad=True), INDICES["top-2"], torch.rand(5, 2))
    assert kept, "the hook saw nothing"
    lora_sizes = {f.numel() for f in lora_factors()}
    assert all(t.numel() < H * I or t.numel() in lora_sizes for t in kept if t.dtype.is_floating_point)
    assert not [t.shape for t in living(shapes) if id(t) not in before]
    out.sum().backward()
    assert not [t.shape for t in living(shapes) if id(t) not in before]


def living(shapes):
    sizes = list(map(list, shapes))  # lists: a symbolic size has no hash
    tensors = (t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.dtype.is_floating_point)
    return [t for t in tensors if list(t.shape) in sizes]


def test_the_scales_of_few_experts_are_undone_one_by_one():
    """The same bits, without a look at the others: theirs are replaced by NaN."""
    weight = torch.randn(E, 128, 128)  # 256 blocks an expert: one block of the second quantisation
    packed = experts.quantize_stack(weight)
    whole = experts.dequantize_stack(packed)
    packed.quant_state.state2.absmax[[0, 1, 3]] = float("nan")
    assert torch.equal(experts.Unpacker(packed, torch.float32, few=True)(2), whole[2])
    assert experts.Unpacker(packed, torch.float32, few=True).scales is None
    odd = experts.quantize_stack(torch.randn(E, 64, 64))  # 64 blocks an expert: four share a second scale
    assert torch.equal(experts.Unpacker(odd, torch.float32, few=True)(2), experts.dequantize_stack(odd)[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_packing_in_slices_gives_bitsandbytes_own_bits(monkeypatch, dtype, double_quant):
    weight = torch.randn(E, 96, 192).to(dtype)
    codes, state = bnbf.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    monkeypatch.setitem(experts._SLICE, "cpu", 64 * 7)  # does not divide a matrix
    packed = experts.quantize_stack(weight, double_quant)
    assert torch.equal(packed.data, codes)
    ours, theirs = packed.quant_state.as_dict(packed=True), state.as_dict(packed=True)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    one_by_one = experts.pack((matrix for matrix in weight), weight.shape, double_quant)
    assert torch.equal(one_by_one.data, codes)


def test_packing_refuses_what_does_not_fit():
    matrices = list(torch.randn(4, 64, 64))
    with pytest.raises(ValueError, match="3 experts were given, the model has 4"):
        experts.pack(matrices[:3], (4, 64, 64))
    with pytest.raises(ValueError, match=r"expert 1 has shape \(32, 64\)"):
        experts.pack([matrices[0], matrices[1][:32]], (4, 64, 64))


def test_decoding_unpacks_only_the_experts_that_the_token_chose(random_mixtral, monkeypatch):
    """`generate` with a cache: every step but the first has one token, which chose 2 of 8 experts in each of 2 layers."""
    model = load_4bit(random_mixtral, dtype="float32").eval()
    chosen, unpacked = [], []
    for module in model.modules():
        if experts.is_experts(module):
            module.register_forward_pre_hook(lambda m, args: (chosen.append(args[1].clone()), unpacked.append([]))[0])
    original = experts.Unpacker.pieces
    monkeypatch.setattr(experts.Unpacker, "pieces", lambda self, e: (unpacked[-1].append(e), original(self, e))[1])
    out = model.generate(
        torch.tensor([[5, 6, 7, 8]]), max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0
    )
    assert out.shape == (1, 10) and len(chosen) == 6 * 2
    for index, asked in zip(chosen, unpacked, strict=True):
        assert sorted(asked) == sorted(2 * index.unique().tolist()), "each chosen expert once for each of its two projections"
    assert all(index.shape == (1, 2) and len(asked) == 4 for index, asked in zip(chosen[2:], unpacked[2:], strict=True))


@pytest.mark.parametrize("weights", [1, 64 * 7, 128 * 64])
def test_unpacking_in_pieces_changes_nothing(monkeypatch, weights):
    """`weights` at a time: less than a row, several rows that do not divide the matrix, half of the larger matrix."""
    packed, _ = make()
    index, weight, factors = INDICES["top-2"], torch.rand(5, 2), lora_factors()
    attach(packed, factors)
    found = []
    for most in (2**20, weights):
        monkeypatch.setitem(experts._PIECE, "cpu", most)
        x = torch.randn(5, H, generator=torch.Generator().manual_seed(3)).requires_grad_()
        out = packed(x, index, weight)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *factors])])
    whole = experts.Unpacker(packed.gate_up_proj, torch.float32)
    assert len(list(whole.pieces(1))) == -(-2 * I // max(1, weights // H))
    assert torch.equal(torch.cat([w for _, w in whole.pieces(1)]), whole(1))
    assert len(list(experts.Unpacker(packed.gate_up_proj, torch.bfloat16).pieces(1))) == 1
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 2e-6 * a.norm()


def test_the_scale_multiplies_the_adapters_product():
    packed, _ = make()
    index, weight, x = INDICES["top-2"], torch.rand(5, 2), torch.randn(5, H)
    a1, b1, a2, b2 = lora_factors()
    outs = []
    for scale, times in ((0.5, 1.0), (1.0, 0.5)):
        packed.lora_factors = {
            "gate_up_proj": experts.Factors(a1, b1 * times, scale=scale),
            "down_proj": experts.Factors(a2, b2 * times, scale=scale),
        }
        out = packed(x, index, weight)
        outs.append([out, *torch.autograd.grad(out.square().sum(), [a1, b1, a2, b2])])
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_dropout_draws_the_same_mask_in_backward():
    """A finite difference along one direction sees the mask of forward; the gradient must agree with it."""
    packed, _ = make()
    factors = lora_factors()
    attach(packed, factors, dropout=0.5)
    packed.train()
    index, weight = INDICES["top-2"], torch.rand(5, 2)
    x, direction, up = torch.randn(5, H, dtype=torch.float64), torch.randn(5, H, dtype=torch.float64), torch.randn(5, H)

    def value(v):
        torch.manual_seed(7)
        return (packed(v, index, weight) * up).sum()

    x.requires_grad_()
    (gradient, ga) = torch.autograd.grad(value(x), [x, factors[0]])
    slope = (value(x.detach() + 1e-6 * direction) - value(x.detach() - 1e-6 * direction)) / 2e-6
    assert abs((gradient * direction).sum() - slope) < 1e-4 * abs(slope) + 1e-4
    assert ga.abs().sum() > 0
    packed.eval()
    torch.manual_seed(7)
    assert not torch.equal(packed(x, index, weight), packed.train()(x, index, weight))


def test_unsupported_layouts_are_named():
    packed, _ = make()
    assert experts.unsupported(packed) is None
    packed.is_transposed = True
    assert "transposed" in experts.unsupported(packed)
    config = MixtralConfig(hidden_size=48, intermediate_size=I, num_local_experts=2)
    assert "multiple" in experts.unsupported(MixtralExperts(config))
