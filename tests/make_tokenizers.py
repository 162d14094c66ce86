"""Tokenizers of the kinds that base models have, small enough to make on the spot; and Mixtral's own."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from helpers.data_card import load_tokenizer
from helpers.profiles import ROOT
from helpers.prompts import format_story
from helpers.tiny_stories import make_story

KINDS = ("tiny", "metaspace-bpe", "metaspace-unigram", "sentencepiece", "sentencepiece-legacy", "mixtral", "no-bos")


def make_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """tiny: the course's byte-level BPE. metaspace: ▁ for spaces, one put in front. sentencepiece: trained by the library itself
    with Mixtral's settings (BPE, byte fallback, dummy prefix, no normalisation), loaded as transformers 5 loads it; legacy: with
    the normalizer of the tokenizer.json files on the Hub. no-bos: byte-level without a begin token, as OLMoE's.
    """
    return _made(kind)


@functools.cache
def _corpus() -> list[str]:
    return [format_story(make_story(k)) for k in range(40)]


@functools.cache
def _made(kind: str) -> PreTrainedTokenizerBase:
    if kind == "mixtral":
        return load_tokenizer("mixtral")
    if kind.startswith("sentencepiece"):
        return _sentencepiece(legacy=kind.endswith("legacy"))
    if kind.startswith("metaspace"):
        return _metaspace(kind.partition("-")[2])
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data_samples" / "tiny_base")
    if kind == "no-bos":
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _metaspace(model: str) -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>"]
    if model == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator([*_corpus(), "# — ### Response: (length = medium) \\ 修理 🦉"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _sentencepiece(legacy: bool) -> PreTrainedTokenizerBase:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in _corpus() for line in text.split("\n") if line),
        model_writer=model, model_type="bpe", vocab_size=900, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(model.getvalue())
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if legacy:
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    return tokenizer
