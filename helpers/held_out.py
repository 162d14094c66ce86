"""The loss on stories that no training saw, by the length class of the reply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from helpers import losses
from helpers.data import Labelled
from helpers.lengths import LENGTHS, label_replies, length_class
from helpers.profiles import ROOT, Profile
from helpers.stories import load_stories
from helpers.tokens import IGNORED, Collator, encode_all, packed_row, trained_spans


def held_out_stories(profile: Profile, count: int = 24) -> list[Labelled]:
    """Stories beside the training data, every reply with the modifier of its class.

    tiny: generated from seeds of their own, with fewer evenly drawn lengths than in training (0.6 for 0.9); otherwise those of
    `data_samples/heldout`.
    """
    if not profile.stories.startswith("generated:"):
        stories = load_stories(ROOT / "data_samples" / "heldout")[:count]
        return [(story, label_replies(story, 0.0)) for story in stories]
    from helpers.tiny import EVALUATION_SEED
    from helpers.tiny_stories import labelled_story

    first = EVALUATION_SEED + 500_000
    return [labelled_story(first + k, balanced=0.6, omit=0.0, max_words=200) for k in range(count)]


def reply_classes(labelled: Sequence[Labelled]) -> list[list[str]]:
    """The class of each character reply, by its own words."""
    return [[length_class(m.text) for m in story.replies] for story, _ in labelled]


class HeldOutLoss:
    """Called with a model: mean cross-entropy (nats per token) over all reply tokens ("all") and by length class.

    Draws no random numbers and leaves the model in the mode in which it was. A class without a reply is left out. Stories
    beyond the context lose their first turns, as in training; one whose last reply alone is longer is left out (`left_out`
    says how many), because a context may be chosen shorter than the stories that are measured on. With none left, {}.
    """

    def __init__(self, labelled: Sequence[Labelled], tokenizer, context: int, pad: int, batch_size: int = 4):
        self.batches, self.left_out = [], 0
        self.replies, self.tokens = Counter(), Counter()  # that are measured on, by class
        samples = sorted(self._samples(labelled, tokenizer, context), key=lambda pair: -len(pair[0]))
        collate = Collator(pad)
        for start in range(0, len(samples), batch_size):
            part = samples[start : start + batch_size]
            batch = collate([packed_row([sample]) for sample, _ in part])
            kinds = torch.full_like(batch["labels"], IGNORED)
            for row, (sample, classes) in enumerate(part):
                kinds[row, : len(sample)] = torch.tensor(classes)
            self.batches.append((batch, kinds))

    def _samples(self, labelled, tokenizer, context):
        """(sample, class number of each token)."""
        unfit = {}
        encoded = list(encode_all(labelled, tokenizer, context, unfit=unfit))
        self.left_out = len(unfit)
        fitting = [pair for k, pair in enumerate(labelled) if k not in unfit]
        for sample, names in zip(encoded, reply_classes(fitting), strict=True):
            spans, classes = trained_spans(sample.labels), [IGNORED] * len(sample)
            kept = names[len(names) - len(spans) :]  # the first turns may have been dropped
            for name, span in zip(kept, spans, strict=True):
                classes[span.start : span.stop] = [LENGTHS.index(name)] * len(span)
                self.replies[name] += 1
                self.tokens[name] += len(span)
            yield sample, classes

    def __call__(self, model: nn.Module) -> dict[str, float]:
        if not self.tokens:
            return {}
        device = model.get_output_embeddings().weight.device
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        plain = losses.plain_head(model)
        with losses.evaluation_mode(model):
            for batch, kinds in self.batches:
                inputs = {k: batch[k].to(device) for k in ("input_ids", "position_ids")}
                nats = losses.completion_token_losses(model, inputs, batch["labels"].to(device), plain)
                moved = losses.next_tokens(kinds)
                found.append((nats.cpu(), moved[moved != IGNORED]))
        nats, kinds = (torch.cat(parts) for parts in zip(*found, strict=True))
        by_class = {name: nats[kinds == i] for i, name in enumerate(LENGTHS)}
        result = {"all": nats.mean().item()} | {name: x.mean().item() for name, x in by_class.items() if len(x)}
        return {name: round(value, 5) for name, value in result.items()}
