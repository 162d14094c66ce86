"""Packed rows through every attention that is there: equal results, and no document sees another."""

from __future__ import annotations

import functools
import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    SwitchTransformersForConditionalGeneration,
)
from transformers.masking_utils import flash_attention_mask

from helpers import attention, losses, training
from helpers.data import build_corpus
from helpers.router_losses import attach_router_losses
from helpers.tokens import Collator, Encoded, document_bounds, packed_row
from helpers.trainer import CourseTrainer, NumberedCollator
from tests import small_runs
from tests.moe_families import knows_routers, tiny
from tests.small_runs import STORIES, small_profile, train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARLEN = "varlen_by_hand"
NAMES = ["eager", "sdpa", attention.DOCUMENTS, "flex_attention", VARLEN]


def by_hand(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What FlashAttention does with given bounds: rows end to end, one product a document. It needs a GPU, this does not."""
    assert attention_mask is None
    rows, heads, width, size = query.shape
    groups, sizes = heads // key.shape[1], [width] * rows
    if "cu_seq_lens_q" in kwargs:  # the trainer tries out the head without
        assert torch.equal(kwargs["cu_seq_lens_k"], kwargs["cu_seq_lens_q"]) and kwargs["cu_seq_lens_q"].dtype == torch.int32
        sizes = [b - a for a, b in pairwise(kwargs["cu_seq_lens_q"].tolist())]
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(sizes)
    flat = [x.transpose(1, 2).reshape(rows * width, -1, size) for x in (query, key, value)]
    flat[1:] = [x.repeat_interleave(groups, 1) for x in flat[1:]]
    parts = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), is_causal=True, scale=scaling).transpose(0, 1)
        for part in zip(*(x.split(sizes) for x in flat), strict=True)
    ]
    return torch.cat(parts).view(rows, width, heads, size), None


AttentionInterface.register(VARLEN, by_hand)
AttentionMaskInterface.register(VARLEN, flash_attention_mask)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_runs.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def batch(base):
    rows = build_corpus(STORIES, AutoTokenizer.from_pretrained(base), 512).numbered()
    several = [row for row in rows if (row["position_ids"] == 0).sum() > 1][:2]
    assert len(several) == 2, "two rows of several documents"
    made = NumberedCollator(0, multiple=128)(several)
    return {k: v.to(DEVICE) for k, v in made.items()}


@functools.cache
def compiler_problem() -> str | None:
    """Why torch.compile does not work here, in one line. transformers compiles flex_attention.

    It needs a C++ compiler, and torch hands it the path of its own libraries unquoted: not in a folder with a space.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(3, device=DEVICE))
    except Exception as error:  # of torch or of the compiler: each has its own
        return "a space in the path of torch" if " " in torch.__file__ else str(error).strip().splitlines()[0]
    return None


def need_compiler(name):
    if name == "flex_attention" and (problem := compiler_problem()):
        pytest.skip(f"torch.compile does not work here: {problem}")


def loaded(base, name):
    need_compiler(name)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=name).to(DEVICE)
    assert model.config._attn_implementation == name
    return model.requires_grad_(False)


def given(batch, name):
    """What the model of an attention is given, as in the trainer."""
    inputs = {k: batch[k] for k in ("input_ids", "position_ids")}
    return inputs | document_bounds(batch["position_ids"]) if name == VARLEN else inputs


@torch.no_grad()
def logits(base, name, batch):
    return loaded(base, name)(**given(batch, name), use_cache=False).logits


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_document_is_computed_as_if_it_were_alone(base, batch, name):
    """Against the plain model, one document at a time: no packing, no mask."""
    found, alone = logits(base, name, batch), loaded(base, "eager")
    for row, (ids, positions) in enumerate(zip(batch["input_ids"], batch["position_ids"], strict=True)):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for a, b in pairwise(starts):
            with torch.no_grad():
                wanted = alone(ids[None, a:b], use_cache=False).logits[0]
            torch.testing.assert_close(found[row, a:b], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_document_changes_itself_alone(base, batch, name):
    positions = batch["position_ids"]
    start, end = (positions[0] == 0).nonzero().flatten()[1:3].tolist()
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, start] = (changed["input_ids"][0, start] + 7) % 100 + 3
    difference = (logits(base, name, batch) - logits(base, name, changed)).abs().amax(-1)
    assert (difference[0, start:end] > 1e-6).float().mean() > 0.9, "what follows in the document notices"
    difference[0, start:end] = 0
    # on a GPU, experts with other numbers of rows may take other kernels
    assert difference.max() < (1e-6 if DEVICE == "cpu" else 1e-5)


def test_flash_attention_without_bounds_would_mix_documents():
    """Why the trainer gives them: transformers looks for packed documents only in a batch of one row."""
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    packed = torch.tensor([[0, 1, 2, 0, 1]])
    assert _is_packed_sequence(packed, 1) and not _is_packed_sequence(packed.repeat(2, 1), 2)


@pytest.mark.parametrize("name", NAMES[1:])
def test_loss_and_gradients_of_a_training_batch_are_those_of_eager(base, batch, name, tmp_path):
    need_compiler(name)
    found = []
    for kind in ("eager", name):
        model = training.prepare_model(small_profile(base, lora_dropout=0.0), kind).to(DEVICE)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # B starts at zero, and then A gets no gradient
                    parameter.normal_(0, 0.02, generator=torch.Generator(DEVICE).manual_seed(parameter.numel()))
        handle = attach_router_losses(model, 1e-3, 1e-3)
        args = training.arguments(small_profile(base), tmp_path)
        trainer = CourseTrainer(model=model, args=args, train_dataset=[], router_losses=handle)
        try:
            loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(50))
            loss.backward()
        except NotImplementedError as error:
            assert name == "flex_attention" and DEVICE == "cpu"
            pytest.skip(f"forward only: {error}")
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (other, others) = found
    assert abs(loss / other - 1) < 1e-5 and gradients.keys() == others.keys() and len(gradients) == 2 * (4 + 2)
    for key, gradient in gradients.items():
        assert gradient.norm() > 0 and (gradient - others[key]).norm() <= 1e-4 * gradient.norm(), key


def test_the_loss_through_flex_is_that_of_eager(base, batch):
    """Its forward pass, where torch has no backward pass for it."""
    found = []
    for name in ("eager", "flex_attention"):
        model = loaded(base, name)
        with torch.no_grad():
            found.append(losses.completion_loss(model, given(batch, name), batch["labels"], model).item())
    assert abs(found[0] / found[1] - 1) < 1e-5


def test_the_bounds_count_padding_as_a_document():
    rows = [packed_row([Encoded([5] * n, [5] * n) for n in sizes]) for sizes in ((3, 2, 4), (6,))]
    bounds = document_bounds(Collator(0, multiple=4)(rows)["position_ids"])
    assert bounds["cu_seq_lens_q"].tolist() == [0, 3, 5, 9, 12, 18, 24]
    assert bounds["max_length_q"] == 6


# ---------------------------------------------------------------------------------------------------- which one


@pytest.mark.parametrize(
    ("kind", "dtype", "capability", "flash", "wanted"),
    [
        (MixtralForCausalLM, "bfloat16", None, True, attention.DOCUMENTS),
        (MixtralForCausalLM, "float16", (7, 5), True, attention.DOCUMENTS),
        (MixtralForCausalLM, "bfloat16", (8, 0), True, "flash_attention_2"),
        (MixtralForCausalLM, torch.float32, (8, 0), True, attention.DOCUMENTS),
        (MixtralForCausalLM, "bfloat16", (9, 0), False, attention.DOCUMENTS),
        (OlmoeForCausalLM, torch.bfloat16, (8, 9), True, "flash_attention_2"),
        (OlmoeForCausalLM, "bfloat16", (8, 9), False, attention.DOCUMENTS),
        (SwitchTransformersForConditionalGeneration, "bfloat16", (8, 9), False, "eager"),
    ],
)
def test_the_best_attention_that_is_there(kind, dtype, capability, flash, wanted):
    name, why = attention.best_attention(kind, dtype, capability, flash)
    assert name == wanted and why
    assert attention.choose_attention(kind, dtype, "sdpa") == ("sdpa", "asked for")


# ------------------------------------------------------------------------------------------------------- documents


class Products(TorchFunctionMode):
    """Pairs of query and key that SDPA is called with, and how often with a mask."""

    def __init__(self):
        super().__init__()
        self.pairs, self.masks = 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.pairs += args[0].shape[0] * args[0].shape[2] * args[1].shape[2]
            self.masks += kwargs.get("attn_mask") is not None
        return func(*args, **kwargs)


def test_between_documents_nothing_is_computed(base, batch):
    lengths = []
    for positions in batch["position_ids"]:
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        lengths += [b - a for a, b in pairwise(starts)]
    found = {}
    for name in ("sdpa", attention.DOCUMENTS):
        with torch.no_grad(), Products() as products:
            loaded(base, name)(**given(batch, name), use_cache=False)
        found[name] = products
    assert found[attention.DOCUMENTS].pairs == sum(n * n for n in lengths) and found[attention.DOCUMENTS].masks == 0
    assert found["sdpa"].masks == 1
    assert found["sdpa"].pairs == batch["input_ids"].numel() * batch["input_ids"].shape[1] > 2 * sum(n * n for n in lengths)


@torch.no_grad()
def test_what_is_not_packed_is_left_to_sdpa(base, tokenizer):
    """Padding at the left, and a cache: what generation needs."""
    model, plain = loaded(base, attention.DOCUMENTS), loaded(base, "sdpa")
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **settings), plain.generate(**inputs, **settings))
    assert torch.equal(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits), "rows of one document"


@torch.no_grad()
def test_a_sliding_window_is_left_to_sdpa(base, batch):
    """The lengths of documents say nothing of a window."""
    found = []
    for name in ("sdpa", attention.DOCUMENTS):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=name, sliding_window=16)
        found.append(model.to(DEVICE)(**given(batch, name), use_cache=False).logits)
    assert torch.equal(*found)
    assert (found[0] - logits(base, "sdpa", batch)).abs().max() > 1e-3, "the window does something"


# ------------------------------------------------------------------------------------------- do documents stay apart?


def family(kind: str, dtype: torch.dtype = torch.float32, name: str = attention.DOCUMENTS):
    """A tiny model whose weights are large enough for its layers to matter beside the embeddings."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.1)
    model.set_attn_implementation(name)
    return model.to(DEVICE, dtype).eval()


@torch.no_grad()
def effect(model) -> tuple[float, float]:
    """How far other words in a row's first document move the second one's logits, and the first one's own."""
    ids = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    positions = torch.cat([torch.arange(9), torch.arange(11)])[None].to(DEVICE)
    found = []
    for words in (ids, torch.cat([ids[:, :9].flip(1), ids[:, 9:]], 1)):
        found.append(model(input_ids=words, position_ids=positions, use_cache=False).logits.float())
    difference = (found[0] - found[1]).norm(dim=-1)[0] / found[0].norm(dim=-1)[0]
    return difference[9:].max().item(), difference[:9].median().item()


APART = ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "phimoe", "granitemoe"]
MIXED = ["granitemoehybrid", "jamba", "qwen3_next", "afmoe"]
UNKNOWN_MASK = ["deepseek_v32"]  # its indexer takes any mask for a table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", APART)
def test_models_that_keep_documents_apart_are_left_as_they_are(kind, dtype):
    model = family(kind, dtype)
    assert attention.check_packing(model) == attention.DOCUMENTS == model.config._attn_implementation
    if dtype == torch.float32:
        other, own = effect(model)
        assert other < 1e-5 and own > 0.1


@pytest.mark.parametrize("name", [attention.DOCUMENTS, "eager"])
@pytest.mark.parametrize("kind", MIXED)
def test_models_that_mix_documents_are_refused_by_name(kind, name):
    model = family(kind, name=name)
    assert effect(model)[0] > 0.01
    tried = {attention.DOCUMENTS: "sdpa_documents: .* sdpa: a document changes", "eager": "eager: a document changes"}
    with pytest.raises(ValueError, match=f"^{type(model).__name__} cannot be trained on packed rows.*{tried[name]}.*OLMoE$"):
        attention.check_packing(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", MIXED)
def test_a_leak_is_told_from_rounding(kind, dtype):
    with pytest.raises(ValueError, match="a document changes the next one's logits by"):
        attention.check_packing(family(kind, dtype))
    leak, rounding = attention.packing_errors(family(kind, dtype))
    assert leak > 20 * max(rounding, torch.finfo(dtype).eps)


@knows_routers
@pytest.mark.parametrize("kind", UNKNOWN_MASK)
def test_models_that_fail_with_document_lengths_are_given_sdpa(kind):
    model = family(kind)
    with pytest.raises(IndexError):
        effect(model)
    assert attention.check_packing(model) == "sdpa" == model.config._attn_implementation
    other, own = effect(model)
    assert other < 1e-5 and own > 0.1


def test_flash_attention_is_tried_as_it_is_trained(base, monkeypatch):
    """With the documents' bounds: without them, it would mix them."""
    model = loaded(base, VARLEN)
    assert attention.check_packing(model) == VARLEN
    monkeypatch.setattr(attention, "bounds", lambda *_: {})
    with pytest.raises(ValueError, match=f"MixtralForCausalLM .*{VARLEN}: a document changes the next"):
        attention.check_packing(model)


def test_trying_it_out_leaves_no_trace(base):
    model = training.prepare_model(small_profile(base, dtype="bfloat16", lora_dropout=0.5)).train()
    handle = attach_router_losses(model, 1e-3, 1e-3)
    modes = [m.training for m in model.modules()]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    noise = model.get_base_model().model.layers[0].register_forward_pre_hook(lambda *_: torch.manual_seed(0) and None)
    assert attention.check_packing(model) == attention.DOCUMENTS
    noise.remove()
    assert torch.equal(state, torch.get_rng_state()) and modes == [m.training for m in model.modules()]
    assert all(torch.equal(weights[n], p) and p.grad is None for n, p in model.named_parameters())
    assert handle.metrics == {} and handle.injected == 0 and "never reported" in handle.problem()
    leak, rounding = attention.packing_errors(model)
    assert (leak, rounding) == attention.packing_errors(model), "no dropout, and the same documents each time"


@knows_routers
@pytest.mark.parametrize(("kind", "settled"), [("granitemoehybrid", None), ("deepseek_v32", "sdpa")])
def test_a_run_tries_it_out_before_its_first_step(kind, settled, base, tmp_path, capsys):
    model = family(kind)
    model.resize_token_embeddings(AutoTokenizer.from_pretrained(base).vocab_size)
    model.config.max_position_embeddings = 512
    folder = tmp_path / kind
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    profile = small_profile(folder, max_steps=1, lora_router=False)
    if settled is None:
        with pytest.raises(ValueError, match="GraniteMoeHybridForCausalLM cannot be trained on packed rows"):
            train(folder, tmp_path / "run", profile)
        assert not list((tmp_path / "run").glob("checkpoint-*"))
    else:
        result = train(folder, tmp_path / "run", profile)
        assert json.loads((result.run_dir / "result.json").read_text())["attention"] == settled
        assert f"attention: {settled} (sdpa_documents does not serve" in capsys.readouterr().out


def test_a_run_takes_the_attention_that_was_asked_for_and_says_so(base, tmp_path, capsys):
    profile = small_profile(base, max_steps=3)
    default, eager = train(base, tmp_path / "default", profile), train(base, tmp_path / "eager", profile, attention="eager")
    assert "attention: eager (asked for)" in capsys.readouterr().out
    for result, name in ((default, attention.choose_attention(MixtralForCausalLM, "float32")[0]), (eager, "eager")):
        assert json.loads((result.run_dir / "result.json").read_text())["attention"] == name
    assert abs(default.history[-1]["loss"] - eager.history[-1]["loss"]) < 1e-4


def test_a_small_leak_is_a_leak(base, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    monkeypatch.setattr(attention, "packing_errors", lambda m: (0.01, 1e-7))
    with pytest.raises(ValueError, match="changes the next one's logits by 1%"):
        attention.check_packing(model)
    monkeypatch.setattr(attention, "packing_errors", lambda m: (5e-7, 1e-7))
    assert attention.check_packing(model) == model.config._attn_implementation


def test_a_lack_of_memory_is_not_taken_for_a_model_that_cannot(base, monkeypatch):
    def full(_model):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "packing_errors", full)
    with pytest.raises(torch.OutOfMemoryError):
        attention.check_packing(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
