"""What becomes of stories on their way to packed rows: settings that must reach every sample."""

from __future__ import annotations

import dataclasses

import pytest

from helpers.data import build_corpus, labelled_stories
from helpers.lengths import length_class
from helpers.profiles import PROFILES
from tests.small_runs import STORIES


def test_given_stories_lose_labels_at_the_profiles_rate():
    stories = [s for s, _ in labelled_stories(dataclasses.replace(PROFILES["tiny"], stories="generated:20"))]
    for omit in (0.0, 1.0):
        for story, lengths in labelled_stories(dataclasses.replace(PROFILES["tiny"], omit=omit), stories):
            assert lengths == [None if omit else length_class(m.text) for m in story.replies]


@pytest.mark.parametrize("long", ["drop", "split"])
def test_loss_and_eos_reach_every_sample(tokenizer, long):
    corpus = build_corpus(STORIES[:4], tokenizer, 2048, loss="all", eos="sample", long=long)
    assert corpus.trained > 0.9 * corpus.tokens and sum(r["input_ids"].tolist().count(2) for r in corpus.rows) == 4
