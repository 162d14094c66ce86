"""The 4-bit expert MLP against a float64 loop over dequantised experts, and its promise to keep no weights."""

from __future__ import annotations

import gc

import bitsandbytes.functional as bnbf
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from helpers import activation_checkpointing, expert_pass, experts, nf4
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
        setattr(packed, name, nf4.quantize_stack(weight))
        setattr(twin, name, nn.Parameter(nf4.dequantize_stack(getattr(packed, name)).double(), requires_grad=False))
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
    packed = nf4.quantize_stack(weight)
    whole = bnbf.dequantize_4bit(packed.data, packed.quant_state)
    assert torch.equal(nf4.dequantize_stack(packed), whole.view(E, 2 * I, H))
    alone, state = bnbf.quantize_4bit(weight[2].contiguous(), blocksize=64, quant_type="nf4")
    assert torch.equal(alone.flatten(), packed.data.view(E, -1)[2]), "the codes of an expert do not depend on its neighbours"
    assert (nf4.dequantize_stack(packed)[2] - bnbf.dequantize_4bit(alone, state)).abs().max() < 0.02


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
    packed = nf4.quantize_stack(weight)
    whole = nf4.dequantize_stack(packed)
    packed.quant_state.state2.absmax[[0, 1, 3]] = float("nan")
    assert torch.equal(nf4.Unpacker(packed, torch.float32, few=True)(2), whole[2])
    assert nf4.Unpacker(packed, torch.float32, few=True).scales is None
    odd = nf4.quantize_stack(torch.randn(E, 64, 64))  # 64 blocks an expert: four share a second scale
    assert torch.equal(nf4.Unpacker(odd, torch.float32, few=True)(2), nf4.dequantize_stack(odd)[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_packing_in_slices_gives_bitsandbytes_own_bits(monkeypatch, dtype, double_quant):
    weight = torch.randn(E, 96, 192).to(dtype)
    codes, state = bnbf.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    monkeypatch.setitem(nf4.SLICE, "cpu", 64 * 7)  # does not divide a matrix
    packed = nf4.quantize_stack(weight, double_quant)
    assert torch.equal(packed.data, codes)
    ours, theirs = packed.quant_state.as_dict(packed=True), state.as_dict(packed=True)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    one_by_one = nf4.quantize_matrices((matrix for matrix in weight), weight.shape, double_quant)
    assert torch.equal(one_by_one.data, codes)


def test_packing_refuses_what_does_not_fit():
    matrices = list(torch.randn(4, 64, 64))
    with pytest.raises(ValueError, match="3 experts were given, the model has 4"):
        nf4.quantize_matrices(matrices[:3], (4, 64, 64))
    with pytest.raises(ValueError, match=r"expert 1 has shape \(32, 64\)"):
        nf4.quantize_matrices([matrices[0], matrices[1][:32]], (4, 64, 64))


def test_decoding_unpacks_only_the_experts_that_the_token_chose(random_mixtral, monkeypatch):
    """`generate` with a cache: every step but the first has one token, which chose 2 of 8 experts in each of 2 layers."""
    model = load_4bit(random_mixtral, dtype="float32").eval()
    chosen, unpacked = [], []
    for module in model.modules():
        if experts.is_experts(module):
            module.register_forward_pre_hook(lambda m, args: (chosen.append(args[1].clone()), unpacked.append([]))[0])
    original = nf4.Unpacker.pieces
    monkeypatch.setattr(nf4.Unpacker, "pieces", lambda self, e: (unpacked[-1].append(e), original(self, e))[1])
    out = model.generate(
        torch.tensor([[5, 6, 7, 8]]), max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0
    )
    assert out.shape == (1, 10) and len(chosen) == 6 * 2
    for index, asked in zip(chosen, unpacked, strict=True):
        assert sorted(asked) == sorted(2 * index.unique().tolist()), "each chosen expert once for each of its two projections"
    assert all(index.shape == (1, 2) and len(asked) == 4 for index, asked in zip(chosen[2:], unpacked[2:], strict=True))


@pytest.mark.parametrize("name", INDICES)
def test_few_rows_through_bitsandbytes_own_product(name, monkeypatch):
    """What a GPU does while it decodes: nothing is unpacked here, and the numbers are those of the float64 loop."""
    packed, twin = make()
    factors, index = lora_factors(), INDICES[name]
    x, weight = torch.randn(len(index), H), torch.rand(index.shape)
    attach(packed, factors)
    wanted = reference(twin, x.double(), index, weight.double(), *[f.double() for f in factors])
    monkeypatch.setattr(nf4.Unpacker, "_rows", None)  # there to fail
    monkeypatch.setitem(nf4.FUSED, "cpu", 5)
    with torch.no_grad():
        torch.testing.assert_close(packed(x, index, weight).double(), wanted, rtol=1e-4, atol=1e-5)
        monkeypatch.setitem(nf4.FUSED, "cpu", 0)
        with pytest.raises(TypeError):
            packed(x, index, weight)


def test_experts_are_fused_by_the_fullest_and_never_in_float64(monkeypatch):
    packed, twin = make()
    index, x, weight = INDICES["top-2"], torch.randn(5, H), torch.rand(5, 2)  # experts of 1 to 3 rows
    monkeypatch.setitem(nf4.FUSED, "cpu", 5)
    monkeypatch.setitem(expert_pass.GROUP, "cpu", 2**30)  # all of them handled together
    factors = lora_factors(dtype=torch.float64)
    attach(packed, factors)
    wanted = reference(twin, x.double(), index, weight.double(), *factors)
    torch.testing.assert_close(packed(x.double(), index, weight.double()), wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        attach(packed, lora_factors())
        monkeypatch.setattr(nf4.Unpacker, "times", None)  # there to fail
        monkeypatch.setitem(nf4.FUSED, "cpu", 2)
        packed(x, index, weight)  # three rows are too many
        monkeypatch.setitem(nf4.FUSED, "cpu", 3)
        with pytest.raises(TypeError):
            packed(x, index, weight)


def test_a_single_token_can_be_learned_from_in_bf16():
    """Few experts, but with gradients: then all factors are in the compute dtype."""
    packed, twin = make(experts_count=8)
    for name in experts.STACKS:
        getattr(packed, name).quant_state.dtype = torch.bfloat16
    g = torch.Generator().manual_seed(0)
    factors = [torch.randn(s, generator=g).mul_(0.3).requires_grad_() for s in [(8, R, H), (8, 2 * I, R), (8, R, I), (8, H, R)]]
    attach(packed, factors)
    x, index, weight = torch.randn(1, H), torch.tensor([[1, 3]]), torch.rand(1, 2)
    packed(x.bfloat16(), index, weight).float().square().sum().backward()
    doubles = [f.detach().double().requires_grad_() for f in factors]
    reference(twin, x.double(), index, weight.double(), *doubles).square().sum().backward()
    for found, wanted in zip(factors, doubles, strict=True):
        assert (found.grad - wanted.grad).norm() < 0.05 * wanted.grad.norm()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_bitsandbytes_own_product_in_every_precision(dtype, rounding, double_quant):
    """Of stacks whose experts fill whole blocks of the second quantisation, and of others."""
    for shape in ((E, 128, 128), (E, 64, 64)):
        stack, x = nf4.quantize_stack(torch.randn(shape).to(dtype), double_quant), torch.randn(3, shape[2]).to(dtype)
        for few in (True, False):
            found = nf4.Unpacker(stack, dtype, few).times(x, 2)
            wanted = x.double() @ nf4.dequantize_stack(stack)[2].double().T
            assert found.dtype == dtype and (found - wanted).norm() < rounding * wanted.norm()


@pytest.mark.parametrize("tokens, all_at_once", [(1, False), (5, True)])
def test_decoding_casts_the_factors_of_the_chosen_experts_alone(tokens, all_at_once):
    """In bf16 under fp32 adapters. Casting all 8 experts' for 2 would cost more than the 4-bit weights of the two."""
    packed, _ = make(experts_count=8)
    for name in experts.STACKS:
        getattr(packed, name).quant_state.dtype = torch.bfloat16
    g = torch.Generator().manual_seed(0)
    attach(packed, [torch.randn(s, generator=g) for s in [(8, R, H), (8, 2 * I, R), (8, R, I), (8, H, R)]])
    x, index = torch.randn(tokens, H), torch.arange(2 * tokens).view(tokens, 2) % 8
    with torch.no_grad(), Made() as made:
        out = packed(x, index, torch.rand(tokens, 2))
    cast = {shape for shape, dtype in made.tensors if dtype == torch.bfloat16 and R in shape and shape[0] == 8}
    assert bool(cast) == all_at_once and out.isfinite().all()


class Made(TorchDispatchMode):
    """Shape and dtype of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.tensors = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.tensors |= {(tuple(t.shape), t.dtype) for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


@pytest.mark.parametrize("weights", [1, 64 * 7, 128 * 64])
def test_unpacking_in_pieces_changes_nothing(monkeypatch, weights):
    """`weights` at a time: less than a row, several rows that do not divide the matrix, half of the larger matrix."""
    packed, _ = make()
    index, weight, factors = INDICES["top-2"], torch.rand(5, 2), lora_factors()
    attach(packed, factors)
    found = []
    for most in (2**20, weights):
        monkeypatch.setitem(nf4.PIECE, "cpu", most)
        x = torch.randn(5, H, generator=torch.Generator().manual_seed(3)).requires_grad_()
        out = packed(x, index, weight)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *factors])])
    whole = nf4.Unpacker(packed.gate_up_proj, torch.float32)
    assert len(list(whole.pieces(1))) == -(-2 * I // max(1, weights // H))
    assert torch.equal(torch.cat([w for _, w in whole.pieces(1)]), whole(1))
    assert len(list(nf4.Unpacker(packed.gate_up_proj, torch.bfloat16).pieces(1))) == 1
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


@pytest.mark.parametrize("together", [0, 2**20])
def test_dropout_draws_the_same_mask_in_backward(monkeypatch, together):
    """A finite difference along one direction sees the mask of forward; the gradient must agree with it."""
    monkeypatch.setitem(expert_pass.GROUP, "cpu", together)
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


MANY = 16


@pytest.mark.parametrize("most", [1, 2 * 2 * I * H, 5 * 2 * I * H, 2**30])
@pytest.mark.parametrize("k", [1, 9])
def test_experts_handled_together_give_what_they_give_alone(monkeypatch, most, k):
    """Groups of one, two, five and all of 16 experts, some of them without a token, with a block of rows that ends in one."""
    packed, _ = make(experts_count=MANY)
    torch.manual_seed(3)
    index = torch.stack([torch.randperm(MANY - 3)[:k] + 1 for _ in range(40)])  # nobody chooses 0, 14 and 15
    index[index == 7] = 8 if k == 1 else 7
    shapes = [(40, H), (40, k), (MANY, R, H), (MANY, 2 * I, R), (MANY, R, I), (MANY, H, R)]
    inputs = [(torch.randn(s) * 0.3).requires_grad_() for s in shapes]
    attach(packed, inputs[2:])
    found, unpacked = [], []
    original = nf4.bnbf.dequantize_4bit
    counted = lambda *a, **kw: (unpacked.append(1), original(*a, **kw))[1]  # noqa: E731
    monkeypatch.setattr(nf4.bnbf, "dequantize_4bit", counted)
    for together, rows in ((0, 2**20), (most, 2 * I * 7)):
        monkeypatch.setitem(expert_pass.GROUP, "cpu", together)
        monkeypatch.setitem(nf4.PIECE, "cpu", max(rows, 2 * I * H))
        out = packed(inputs[0], index, inputs[1])
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs), torch.tensor(len(unpacked))])
        unpacked.clear()
    *alone, count_alone = found[0]
    *grouped, count = found[1]
    for one, other in zip(alone, grouped, strict=True):
        assert (one - other).norm() <= 2e-6 * one.norm()
    assert count_alone == 4 * len(index.unique()), "each expert with tokens: two projections, forward and backward"
    assert count == count_alone if most == 1 else count < count_alone


def test_a_batch_of_products_stays_within_a_gpus_grid():
    """`bmm` of one row and one column for each of 80,000 assignments (4 rows of 10k, all to one expert) may go beyond 65,535."""
    wide = torch.empty(81_920, 8, device="meta")  # what a GPU would be given: no limit by the cache
    blocks = expert_pass.row_blocks(wide)
    assert [block.start for block in blocks[1:]] == [block.stop for block in blocks[:-1]] and blocks[-1].stop == len(wide)
    assert len(blocks) > 1 and all(block.stop - block.start < 65_536 for block in blocks)


def test_an_index_that_names_no_expert_adds_nothing():
    """transformers writes E for a place that holds no token. Memory that nobody wrote must not be read."""
    packed, _ = make()
    attach(packed, lora_factors())
    index, weight = torch.tensor([[0, E], [E, E], [3, 1], [E, 2]]), torch.rand(4, 2)
    nan = [torch.full((8, H), float("nan")) for _ in range(64)]  # what new memory may hold
    del nan
    found = []
    for chosen, weights in ((index, weight), (index.clamp(max=E - 1), weight * (index < E))):
        x = torch.randn(4, H, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = packed(x, chosen, weights)
        found.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for got, wanted in zip(*found, strict=True):
        assert (got - wanted).norm() <= 2e-6 * wanted.norm()
    assert not packed(torch.randn(2, H), torch.full((2, 2), E), torch.rand(2, 2)).any()


def test_recomputation_ends_before_the_down_projection(random_mixtral, monkeypatch):
    """With checkpointing: of gate and up twice forward and once backward, of down once each."""
    model = load_4bit(random_mixtral, dtype="float32").train()
    activation_checkpointing.enable(model)
    model.enable_input_require_grads()
    passes = []
    original = nf4.Unpacker.over
    monkeypatch.setattr(
        nf4.Unpacker, "over", lambda self, spans: (passes.append((self.rows, self.columns)), original(self, spans))[1]
    )
    ids = torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    config = model.config
    up, down = (2 * config.intermediate_size, config.hidden_size), (config.hidden_size, config.intermediate_size)
    assert passes.count(up) * 2 == passes.count(down) * 3 and set(passes) == {up, down}


def test_backward_under_autocast_and_a_second_derivative():
    packed, _ = make()
    factors = lora_factors()
    attach(packed, factors)
    x = torch.randn(5, H, requires_grad=True)
    out = packed(x, INDICES["top-2"], torch.rand(5, 2, generator=torch.Generator().manual_seed(0)))
    wanted = torch.autograd.grad(out.square().sum(), [x, *factors], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(out.square().sum(), [x, *factors], retain_graph=True)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_compiled_it_stays_what_it_is():
    packed, _ = make()
    attach(packed, lora_factors())
    x, weight = torch.randn(5, H), torch.rand(5, 2)
    compiled = torch.compile(packed, backend="eager")
    assert torch.equal(compiled(x, INDICES["top-2"], weight), packed(x, INDICES["top-2"], weight))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad, monkeypatch):
    """Also where quantising hides it: CUDA's takes the largest of a block in a way that passes over NaN."""
    weight = torch.randn(E, 64, 64)
    weight[2, 5, 6] = bad
    original = nf4.bnbf.quantize_4bit
    monkeypatch.setattr(nf4.bnbf, "quantize_4bit", lambda w, **kw: original(w.nan_to_num(0, 0, 0), **kw))
    with pytest.raises(ValueError, match="not finite"):
        nf4.quantize_stack(weight)


def test_dropout_keeps_one_minus_p_and_rescales():
    """Inverted dropout: with p = 0.75 the mean over many draws is the adapter's whole product."""
    packed, _ = make()
    *_, a2, b2 = lora_factors()
    index, weight, x = INDICES["top-2"], torch.rand(5, 2), torch.randn(5, H)
    plain = packed(x, index, weight)
    packed.lora_factors = {"down_proj": experts.Factors(a2, b2, 0.75)}
    whole = packed.eval()(x, index, weight) - plain
    packed.train()
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = torch.stack([packed(x, index, weight) - plain for _ in range(1500)])
    assert (drawn.mean(0) - whole).norm() < 0.2 * whole.norm()
    # a sum of n terms, each kept with 1/4 and times 4, has 3 times the terms' squares for a variance
    assert drawn.std(0).norm() > 0.5 * whole.norm()


def test_every_step_and_every_expert_draws_its_own_mask():
    packed, _ = make()
    for name in experts.STACKS:  # two equal experts
        w = nf4.dequantize_stack(getattr(packed, name))
        w[1] = w[0]
        setattr(packed, name, nf4.quantize_stack(w))
    *_, a2, b2 = lora_factors()
    with torch.no_grad():
        a2[1], b2[1] = a2[0], b2[0]
    packed.lora_factors = {"down_proj": experts.Factors(a2, b2, 0.5)}
    x, index, weight = torch.randn(1, H).expand(2, H), torch.tensor([[0], [1]]), torch.ones(2, 1)
    packed.train()
    first, second = packed(x, index, weight), packed(x, index, weight)
    assert not torch.equal(first, second), "the next step drops other entries"
    assert (first[0] - first[1]).norm() > 0.1 * (first[0] - packed.eval()(x, index, weight)[0]).norm(), "so does the other expert"
    torch.testing.assert_close(*packed(x, index, weight))  # they are equal indeed


def test_each_stack_has_its_own_scale():
    """An adapter with an alpha_pattern, as converted ones have: against the scale multiplied into B."""
    packed, _ = make()
    index, weight, x = INDICES["top-2"], torch.rand(5, 2), torch.randn(5, H).requires_grad_()
    a1, b1, a2, b2 = lora_factors()
    outs = []
    for up, down in ((0.5, 3.0), (1.0, 1.0)):
        packed.lora_factors = {
            "gate_up_proj": experts.Factors(a1, b1 * (0.5 / up), scale=up),
            "down_proj": experts.Factors(a2, b2 * (3.0 / down), scale=down),
        }
        out = packed(x, index, weight)
        outs.append([out, *torch.autograd.grad(out.square().sum(), [x, a1, b1, a2, b2])])
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 1000, 200_000])
def test_groups_stay_within_what_a_gpu_handles_at_once(tokens):
    shape = torch.Size((64, 2048, 2048))  # OLMoE: 2I, H
    groups = expert_pass.groups_of([tokens * (e + 1) for e in range(64)], shape, "cuda")
    assert [e for g in groups for e, _ in g.spans] == list(range(64))
    for g in groups:
        assert (
            len(g.spans) == 1 or max(len(g.spans) * shape[2], g.rows.stop - g.rows.start) * shape[1] <= expert_pass.GROUP["cuda"]
        )
    decoding = expert_pass.groups_of([0] * 10 + [1] * 5 + [2] * 49, shape, "cuda")  # experts 10 and 15
    assert [[e for e, _ in g.spans] for g in decoding] == [[10], [15]], "nothing between them is unpacked"


def test_random_weights_have_the_asked_deviation_and_come_from_the_generator():
    made = [nf4.random_packed((4, 128, 256), 0.03, torch.float32, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    a, b, c = map(nf4.dequantize_stack, made)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert abs(a.std().item() / 0.03 - 1) < 0.03 and abs(a.mean().item()) < 2e-3


@pytest.mark.parametrize(
    "change, word", [({"has_bias": True}, "biases"), ({"has_gate": False}, "gate"), ({"has_post_expert_norm": True}, "norm")]
)
def test_other_layouts_are_named_too(change, word):
    packed, _ = make()
    for name, value in change.items():
        setattr(packed, name, value)
    assert word in experts.unsupported(packed)


def test_the_output_has_the_inputs_dtype():
    packed, _ = make()
    for name in experts.STACKS:
        getattr(packed, name).quant_state.dtype = torch.bfloat16
    x = torch.randn(5, H)
    assert packed(x, INDICES["top-2"], torch.rand(5, 2)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_gpu_uses_for_a_mask_is_a_product_with_it(dtype):
    """torch's operator for the gradient of dropout, without a scale; on the CPU, where both can be had."""
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(37, 50, generator=g).to(dtype), torch.rand(37, 50, generator=g) > 0.3
    assert torch.equal(torch.ops.aten.native_dropout_backward(x, mask, 1.0), x * mask)
    assert torch.equal(expert_pass._kept(x, mask), x * mask) and expert_pass._kept(x, None) is x
    away = expert_pass._kept(x.to("meta"), mask.to("meta"))
    assert away.is_meta and away.dtype == dtype and away.shape == x.shape
