"""Controls, behaviour and conclusions: on answers that are known, and on a model that can be checked by hand."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import behaviour, conclusions, controls
from helpers.evaluation import LengthTable, held_out
from helpers.generation import Prompt, Reply, Sampling
from helpers.lengths import LENGTHS, label_replies, word_range
from helpers.merging import active_factors
from helpers.profiles import PROFILES
from helpers.prompts import generation_prompt
from helpers.qlora import adapter_norms, add_lora
from helpers.tokens import encode
from tests.test_evaluation import table


@pytest.fixture(scope="module")
def stories():
    return held_out(PROFILES["tiny"], 4, reply=3)


@pytest.fixture(scope="module")
def tiny_model():
    from helpers.tiny import HOME

    return AutoModelForCausalLM.from_pretrained(HOME, dtype=torch.float32)


def test_a_random_adapter_changes_weights_as_much_and_leaves_no_trace(random_mixtral):
    model = add_lora(AutoModelForCausalLM.from_pretrained(random_mixtral), r=4, router=False)
    with pytest.raises(ZeroDivisionError), controls.random_adapter(model):
        raise ZeroDivisionError  # whatever happens inside
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.3)
        for f in active_factors(model):  # a trained adapter's factors are in line, so their product is larger than by chance
            f.A[:, :, :4] += 3 * f.B[:, :4].mT

    def change() -> list[torch.Tensor]:
        return [torch.linalg.matrix_norm(f.B @ f.A) for f in active_factors(model)]

    before, trained = {n: p.detach().clone() for n, p in model.named_parameters()}, change()
    norms = adapter_norms(model)
    with controls.random_adapter(model, seed=1):
        inside = {n: p.detach().clone() for n, p in model.named_parameters()}
        for was, now in zip(trained, change(), strict=True):
            torch.testing.assert_close(now, was, rtol=1e-4, atol=0)
        assert all(n == pytest.approx(norms[k], rel=1e-4) for k, n in adapter_norms(model).items() if k.endswith("lora_A"))
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n])
        same = torch.equal(inside[n], before[n])
        assert same != (".lora_" in n), n
        if ".lora_" in n and p.numel() > 500:
            cosine = torch.nn.functional.cosine_similarity(inside[n].flatten(), before[n].flatten(), 0)
            assert abs(cosine) < 6 / math.sqrt(p.numel()), "independent of what was learned"
    with pytest.raises(ValueError, match="no LoRA adapter"), controls.random_adapter(model.get_base_model().lm_head):
        pass


def test_shuffled_labels_keep_every_count_and_tell_nothing():
    from helpers.data import labelled_stories

    labelled = labelled_stories(dataclasses.replace(PROFILES["tiny"], stories="generated:300"))
    shuffled = controls.shuffled_labels(labelled)
    assert [s for s, _ in shuffled] == [s for s, _ in labelled]
    flat = [[x for _, labels in part for x in labels] for part in (labelled, shuffled)]
    assert Counter(flat[0]) == Counter(flat[1]) and flat[0] != flat[1]
    assert shuffled == controls.shuffled_labels(labelled) != controls.shuffled_labels(labelled, seed=1)
    pairs = [(label, m.text) for s, labels in shuffled for label, m in zip(labels, s.replies, strict=True) if label]
    rho = conclusions.stats.spearman([LENGTHS.index(a) for a, _ in pairs], [len(t.split()) for _, t in pairs])
    assert abs(rho) < 4 / math.sqrt(len(pairs))


class Obedient:
    """Answers a prompt with as many words as its modifier's class begins with: behaviour must report just that."""

    def __init__(self, tokenizer, before: str = ""):
        self.tokenizer, self.asked, self.before = tokenizer, [], before

    def ask(self, prompts):
        self.asked += prompts
        replies = []
        for p in prompts:
            last = self.tokenizer.decode(p.ids, skip_special_tokens=True).rpartition("### Response:")[2]
            name = next((n for n in LENGTHS if f"= {n})" in last), None)
            replies.append(Reply(self.before + " ".join(["word"] * (word_range(name)[0] if name else 30)), 3, "eos"))
        return replies


def test_a_change_in_mid_conversation_asks_with_the_models_own_first_reply(stories, tokenizer):
    obedient = Obedient(tokenizer)
    rows = behaviour.change_of_length(obedient, stories)
    assert len(rows) == 4 * 2 * 3
    assert {(r["first"], r["before"]) for r in rows} == {(a, word_range(a)[0]) for a in ("tiny", "enormous")}
    for r in rows:
        assert r["words"] == word_range(r["then"])[0]
    text = tokenizer.decode(obedient.asked[-1].ids, skip_special_tokens=True)
    assert "(length = enormous)" in text and "word word word" in text and text.endswith(f"{stories[-1].names.character}:")
    said = stories[-1].replies[0].text
    assert said not in text, "the story's own reply was replaced"
    means = behaviour.mean_by(rows, "first", "then")
    assert [m["mean"] for m in means[:3]] == [5, 14, 68] and means[0]["low"] == means[0]["high"] == 5
    follows, ignores = conclusions.about_changes(rows, LENGTHS)
    assert follows.reached and float(ignores.measured) == 0
    assert ignores.reached is None, "four conversations show no absence"


def test_a_first_reply_with_what_no_story_may_hold_is_cleaned(stories, tokenizer):
    """Of a base model, or of one that samples at a high temperature, a bell character is nothing unusual."""
    obedient = Obedient(tokenizer, before="\x07\u202e")
    rows = behaviour.change_of_length(obedient, stories)
    assert len(rows) == 4 * 2 * 3 and "\x07" not in tokenizer.decode(obedient.asked[-1].ids)
    nothing = Obedient(tokenizer, before="\x07")
    nothing.ask = lambda prompts: [Reply("\x07", 1, "eos") for _ in prompts]
    assert behaviour.change_of_length(nothing, stories) == []


def test_carry_over_changes_nothing_but_old_modifiers(stories, tokenizer):
    obedient = Obedient(tokenizer)
    rows = behaviour.carry_over(obedient, stories[:1], asked=("medium",))
    texts = [tokenizer.decode(p.ids, skip_special_tokens=True) for p in obedient.asked]
    assert [r["history"] for r in rows] == ["their own", "none", "all tiny", "all enormous"]
    assert [t.count("(length = tiny)") for t in texts[1:]] == [0, 3, 0] and texts[3].count("(length = enormous)") == 3
    bare = {t.replace(" (length = tiny)", "").replace(" (length = enormous)", "") for t in texts[1:]}
    assert bare == {generation_prompt(stories[0].before_reply(3), "medium")}


def test_unknown_modifiers_reach_the_header(stories, tokenizer):
    obedient = Obedient(tokenizer)
    rows = behaviour.unknown_modifiers(obedient, stories[:1], words=("gigantic",))
    text = tokenizer.decode(obedient.asked[0].ids, skip_special_tokens=True)
    char = stories[0].names.character
    assert text == generation_prompt(stories[0].before_reply(0), "medium").replace("= medium", "= gigantic")
    assert text.endswith(f"### Response: (length = gigantic)\n{char}:") and rows[0]["words"] == 30


def test_an_asker_asks_the_model(tiny_model, tokenizer, stories, tmp_path):
    asker = behaviour.Asker(tiny_model, tokenizer, Sampling(max_new_tokens=3), folder=tmp_path)
    replies = asker.ask([Prompt.of(stories[0].before_reply(0), tokenizer, "micro")])
    assert len(replies) == 1 and list(tmp_path.iterdir())


def test_perplexity_is_the_models_own_loss_on_one_reply(tiny_model, tokenizer, stories):
    """Against the loss that transformers computes from labels, reply by reply, and with the modifiers in place."""
    story = dataclasses.replace(stories[0], messages=stories[0].messages[:2])
    (row,) = behaviour.reply_perplexity(tiny_model, tokenizer, [story])
    for kind, lengths in (("with", label_replies(story, omit=0.0)), ("without", None)):
        sample = encode(story, tokenizer, lengths)
        with torch.no_grad():
            loss = tiny_model(input_ids=torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels])).loss.item()
        assert row[kind] == pytest.approx(math.exp(loss), rel=1e-4)
    assert row["replies"] == 1 and row["tokens"] == sample.trained and row["with"] != row["without"]
    rows = behaviour.reply_perplexity(tiny_model, tokenizer, stories)
    assert sum(r["replies"] for r in rows) == sum(len(s.replies) for s in stories)


def test_texts_are_counted_by_how_they_end_and_whom_they_name(stories):
    char, user = stories[0].names
    stranger = next(n for n in sorted(behaviour.known_names(stories)) if n not in stories[0].names)
    said = [
        dict(text=f"{char} waits.", stopped_at=None, end="eos"),
        dict(text=f"{stranger} waits for {user}.", stopped_at=f"\n{user}:", end="stop"),
        dict(text="go go go go go go go go go go go go", stopped_at="\n### Response", end="stop"),
        dict(text="", stopped_at="\n### Input", end="stop"),
    ]
    rows = [{"condition": "tiny", "story": 0, "words": len(r["text"].split()), "tokens": 1, **r} for r in said]
    (row,) = behaviour.text_report(LengthTable("x", rows, [1], {}, 0), stories, behaviour.known_names(stories))
    assert (row["speaks for the user"], row["new header"], row["empty"], row["loops"]) == (0.5, 0.5, 0.25, 0.25)
    assert (row["too short"], row["too long"]) == (0.75, 0.25)
    assert (row["with names"], row["right names"]) == (0.5, 0.5)
    assert behaviour.names_in("Annes and anne, Anne's", {"Anne"}) == {"Anne"}


def test_verbosity_goes_by_the_persona():
    stories = held_out(PROFILES["tiny"], 30)
    kinds = [behaviour.talkativeness(s) for s in stories]
    assert set(kinds) == set(behaviour.TALKATIVE)
    fake = table(lambda c, i: {"quiet": 5, "easy": 10, "talkative": 40}[kinds[i]], n=30)
    rows = behaviour.verbosity(fake, stories)
    assert [(r["persona"], r["mean"]) for r in rows] == [("quiet", 5), ("easy", 10), ("talkative", 40)]
    assert rows[0]["n"] == kinds.count("quiet") and rows[0]["their own"] == 10


def test_conclusions_say_no_when_it_is_no():
    perfect = table(lambda c, i: word_range(c)[0] + i % 2 if c else 10)
    flat = table(lambda c, i: 3 + i)
    assert all(c.reached for c in conclusions.about_adapter(perfect))
    refused = conclusions.about_adapter(flat)
    assert [c.reached for c in refused] == [False] * 5 + [True]
    assert all(c.reached for c in conclusions.about_control(flat, perfect))
    assert not any(c.reached for c in conclusions.about_control(perfect, flat))
    personas = [{"persona": name, "mean": m, "low": m - 2, "high": m + 2} for name, m in (("a", 10), ("b", 11), ("c", 13))]
    natural, order = conclusions.about_no_modifier(perfect, personas)
    assert natural.reached and not order.reached, "a larger mean whose interval overlaps is not called larger"
    personas.append({"persona": "d", "mean": 20, "low": 15.5, "high": 25})
    assert conclusions.about_no_modifier(perfect, personas)[1].reached
    assert conclusions.neighbours(personas, "persona") == [
        "a and b: not told apart, their intervals overlap",
        "b and c: not told apart, their intervals overlap",
        "d above c, beyond intervals",
    ]
    assert conclusions.neighbours(personas[:1:-1], "persona") == ["c below d, beyond intervals"]
    assert conclusions.top_three(perfect).endswith("intervals that overlap: none")
    assert conclusions.top_three(flat).endswith("enormous and humongous, humongous and unlimited")
    assert not conclusions.about_no_modifier(table(lambda c, i: 40))[0].reached
    (names,) = conclusions.about_names([{"with names": 0.9, "right names": 0.9}, {"with names": 0.1, "right names": None}])
    assert not names.reached and names.measured == "90.0%"
    text = conclusions.render(refused)
    assert "1 of 6 goals reached" in text and text.startswith("NO ")


def test_an_absence_is_judged_by_what_chance_gives_and_not_from_a_handful():
    """Lengths drawn at random: of 20 conversations, 0.1 alone would call every sixth control an effect."""
    perfect, few = (table(lambda c, i: word_range(c)[0] if c else 10, n=n) for n in (20, 3))
    missed, above = 0, 0
    for seed in range(40):
        rng = random.Random(seed)
        control = table(lambda c, i, rng=rng: rng.randint(1, 200))
        same, apart = conclusions.about_control(control, perfect)
        missed, above = missed + (not same.reached), above + (abs(control.statistics["spearman"]) > conclusions.CONTROL_LIMIT)
        assert apart.reached
    assert missed <= 5 and above > missed
    assert conclusions.no_more_than(400) == conclusions.CONTROL_LIMIT and conclusions.no_more_than(96) == pytest.approx(
        0.2, abs=0.01
    )
    found = [*conclusions.about_control(few, few), *conclusions.about_adapter(few)]
    assert [c.reached for c in found[:2]] == [None, None], "not even a perfect effect is a finding from three conversations"
    text = conclusions.render(found)
    assert text.startswith("?") and "goal |..| <= 0.36: too few conversations to say" in text
    assert "5 of 5 goals reached; 3 more: too few conversations to say" in text
    weak = table(lambda c, i: 20 + 3 * (LENGTHS.index(c) if c else 0) + (7 * i) % 60)
    assert not conclusions.about_control(weak, perfect)[0].reached, "an effect is still one"


def test_ten_conversations_are_enough_and_nine_are_not():
    assert conclusions.judged(True, 10) is True and conclusions.judged(False, 10) is False and conclusions.judged(True, 9) is None


def said(rho, low, high, n=20, label="control"):
    return SimpleNamespace(
        label=label, statistics=dict(spearman=rho, spearman_low=low, spearman_high=high, conversations=n, replies=1000)
    )


def test_a_control_that_runs_the_other_way_shows_an_effect_too():
    perfect = said(0.95, 0.9, 0.97)
    assert not conclusions.about_control(said(-0.8, -0.85, -0.75), perfect)[0].reached


def test_the_adapter_is_above_its_control_only_if_its_whole_interval_is():
    assert not conclusions.about_control(said(0.05, 0.0, 0.3), said(0.4, 0.2, 0.6))[1].reached
    assert conclusions.about_control(said(0.05, 0.0, 0.3), said(0.5, 0.31, 0.6))[1].reached


def test_replies_that_do_the_opposite_of_the_old_modifier_depend_on_it():
    rows = [
        {"story": s, "then": then, "first": first, "words": 10 * LENGTHS.index(then) + (5 if first == "tiny" else 0)}
        for s in range(20)
        for then in ("tiny", "medium")
        for first in ("tiny", "enormous")
    ]
    # within `then` the shorter old modifier gives more words
    flipped = [{**r, "then": "medium", "words": 50 if r["first"] == "tiny" else 5} for r in rows]
    assert not conclusions.about_changes(flipped, LENGTHS)[1].reached


def test_shares_of_names_weigh_replies():
    (names,) = conclusions.about_names([{"with names": 0.9, "right names": 1.0}, {"with names": 0.1, "right names": 0.0}])
    assert names.measured == "90.0%"


def test_the_goals_are_the_projects():
    goals = {c.claim.partition(": ")[2]: c.goal for c in conclusions.about_adapter(table(lambda c, i: 3))}
    assert goals["replies are in the class asked for"] == ">= 0.60"
    half = table(lambda c, i: word_range(c)[0] if c and i % 2 else 300 if c else 10)  # half in class
    found = {c.claim.partition(": ")[2]: c.reached for c in conclusions.about_adapter(half)}
    assert not found["replies are in the class asked for"]
    cut = table(lambda c, i: word_range(c)[0] if c else 10)
    for r in cut.replies:
        r["end"] = "limit" if r["story"] == 0 else "eos"  # 5 %
    assert not {c.claim.partition(": ")[2]: c.reached for c in conclusions.about_adapter(cut)}["few replies were cut off"]


def test_another_seed_is_another_random_adapter(random_mixtral):
    model = add_lora(AutoModelForCausalLM.from_pretrained(random_mixtral), r=4, router=False)
    found = []
    for seed in (1, 1, 2):
        with controls.random_adapter(model, seed):
            found.append(next(p for n, p in model.named_parameters() if "lora_A" in n).detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
