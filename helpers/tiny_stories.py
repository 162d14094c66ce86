"""A generator of small two-person stories: all the data that the offline profile needs.

Sentences are templates (`tiny_words`) whose slots are carried by the people and the scene: the key of the scenario stays the
key, and a tailor asks what a tailor would do. So a small model has something to learn from its context. Reply lengths are
log-normal, as in human chats, and shifted by how talkative the persona says the person is. The words of the ten length classes
never describe a text here; they occur only as grades on luggage tags, so that a base model has met them without any relation to
the length of a reply.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

from helpers.lengths import BOUNDS, LENGTHS, class_of, count_words, length_class
from helpers.stories import Message, Pair, Story
from helpers.tiny_words import (
    ADJECTIVES,
    ADVERBS,
    ANIMALS,
    COLOURS,
    DRINKS,
    FEELINGS,
    FOOD,
    HE,
    HOBBIES,
    JOBS,
    KEEPSAKES,
    LEADS,
    PARAGRAPHS,
    REQUESTS,
    SCENES,
    SETTINGS,
    SHAPES,
    SHE,
    SMELLS,
    SOUNDS,
    STAGES,
    STEPS,
    TALK,
    TIMES,
    TOWNS,
    TRAITS,
    WEATHER,
)

MEDIAN_WORDS, SIGMA, MAX_WORDS = 19.0, 0.55, 230  # log-normal budget of a message
TALK_SHIFT = {"quiet": -1.2, "easy": 0.0, "talkative": 1.2}  # added to the log of the median


@dataclass
class Person:
    name: str
    she: str
    her: str
    job: str
    town: str
    traits: list[str]
    hobby: str
    keepsake: str
    talk: str


def _capitalise(text: str) -> str:
    text = re.sub(r"\b([Aa]) (?=[aeioAEIO])", r"\1n ", text)
    return text[0].upper() + text[1:]


class Writer:
    """Writes one story. Everything it does follows from its seed."""

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)
        self.genre = rng.choice(list(SCENES))
        scene = SCENES[self.genre]
        self.place, self.goal = rng.choice(scene["place"]), rng.choice(scene["goal"])
        self.things, self.spots = rng.sample(scene["thing"], 6), rng.sample(scene["spot"], 4)
        self.time, self.weather = rng.choice(TIMES), rng.choice(WEATHER)
        self.food, self.drink, self.animal = rng.choice(FOOD), rng.choice(DRINKS), rng.choice(ANIMALS)
        self.topic = self.things[0]
        self.people: list[Person] = []
        for _ in range(2):
            she = rng.random() < 0.5
            taken = {p.name for p in self.people}
            self.people.append(
                Person(
                    name=rng.choice([n for n in (SHE if she else HE) if n not in taken]),
                    she="she" if she else "he",
                    her="her" if she else "his",
                    job=rng.choice(JOBS),
                    town=rng.choice(TOWNS),
                    traits=rng.sample(TRAITS, 2),
                    hobby=rng.choice(HOBBIES),
                    keepsake=rng.choice(KEEPSAKES),
                    talk=rng.choice(("quiet", "easy", "easy", "talkative")),
                )
            )

    def persona(self, who: int) -> str:
        p, rng = self.people[who], self.rng
        first = rng.choice(
            ("{n}, {a}, is a {j} from {t}.", "{n} is a {j} of {a} from {t}.", "A {j} by trade, {n} is {a} and lives in {t}.")
        )
        first = first.format(n=p.name, a=rng.randint(22, 79), j=p.job, t=p.town)
        second = f"{p.she.capitalize()} is {p.traits[0]} and {p.traits[1]}, likes {p.hobby} and carries a {p.keepsake}."
        return _capitalise(f"{first} {second} {rng.choice(TALK[p.talk]).format(N=p.name)}")

    def fill(self, template: str, who: int, pronoun: bool = False, marker: str = "") -> str:
        """A template as a text spoken or done by person `who`; slots of one name have one filling in it."""
        rng, me, you = self.rng, self.people[who], self.people[1 - who]
        spot, spot2 = rng.sample(self.spots, 2)
        # Words that only ever stand in each other's place end up with nearly equal embeddings, which no adapter on frozen
        # embeddings could tell apart. So the ten grades have an order, and weights that overlap with their neighbours':
        # from these the model learns a scale, as a large one has learned from English that huge is more than massive, and
        # that unlimited is no weight at all but the end of the scale.
        grade = rng.randrange(len(LENGTHS))
        top = grade == len(LENGTHS) - 1
        weight = "any weight" if top and rng.random() < 0.7 else f"{max(1, 2 * grade + 3 + round(rng.gauss(0, 1.2)))} pounds"
        above = grade > 0 and rng.random() < 0.5
        order = f"one above {LENGTHS[grade - 1]}" if above else "no limit" if top else f"one below {LENGTHS[grade + 1]}"

        def usual(own: str, words: list[str]) -> str:
            return own if rng.random() < 0.7 else rng.choice(words)

        text = template.format(
            S=me.she.capitalize() if pronoun else me.name, H=me.she.capitalize(), s=me.she, p=me.her,
            n=me.name if rng.random() < 0.4 else me.she, L=you.name, C=self.people[0].name, U=self.people[1].name,
            M=marker, tag=LENGTHS[grade], order=order, weight=weight,
            thing=self.topic, thing2=rng.choice([t for t in self.things if t != self.topic]), spot=spot, spot2=spot2,
            adv=rng.choice(ADVERBS), adj=rng.choice(ADJECTIVES), colour=rng.choice(COLOURS), sound=rng.choice(SOUNDS),
            smell=rng.choice(SMELLS), weather=usual(self.weather, WEATHER), food=usual(self.food, FOOD),
            drink=usual(self.drink, DRINKS), animal=self.animal, feel=rng.choice(FEELINGS), time=usual(self.time, TIMES),
            job=me.job, town=me.town, hobby=me.hobby, keep=me.keepsake, trait=rng.choice(me.traits), ljob=you.job,
            ltown=you.town, ltrait=rng.choice(you.traits), goal=self.goal, place=self.place,
        )  # fmt: skip
        return _capitalise(text)

    def message(self, who: int, budget: int) -> str:
        """A text of the budget's length class, as near to `budget` words as a few attempts come."""
        best, distance = "", math.inf
        for _ in range(12):
            text = self._attempt(who, budget)
            words = count_words(text)
            off = abs(words - budget) + 1000 * (length_class(text) != class_of(budget))
            if off < distance:
                best, distance = text, off
            if distance <= max(1, 0.05 * budget):
                break
        if self.rng.random() < 0.3:
            self.topic = self.rng.choice(self.things)
        return best

    def _attempt(self, who: int, budget: int) -> str:
        """Up to thirty words: one to three sentences; above: a lead, and paragraphs of about 24 words."""
        rng = self.rng
        rank = LENGTHS.index(class_of(budget))
        if rank < len(SHAPES):
            pools = rng.choice(SHAPES[rank])
            templates = [t for pool in pools for t in rng.sample(pool, 1)]
            return " ".join(self.fill(t, who, pronoun=k > 0) for k, t in enumerate(templates))
        low, high = STEPS[rank - len(SHAPES)]
        steps = min(high, max(low, round((budget - 12) / 24)))
        parts = [self.fill(rng.choice(LEADS), who)]
        for template, markers in zip(rng.sample(PARAGRAPHS, steps), STAGES, strict=False):
            parts.append(self.fill(template, who, pronoun=True, marker=rng.choice(markers)))
        return "\n\n".join(parts)

    def budget(self, who: int, previous: float) -> int:
        """Words of the next message: log-normal, shifted by talkativeness, pulled a little to the message before."""
        median = math.log(MEDIAN_WORDS) + TALK_SHIFT[self.people[who].talk] - (0.35 if who == 1 else 0.0)
        median += 0.2 * (previous - median)
        return max(1, min(MAX_WORDS, round(math.exp(self.rng.gauss(median, SIGMA)))))

    def budget_of(self, rank: int) -> int:
        """Words of a message of a class, drawn evenly on a log scale."""
        low, high = (1, *BOUNDS)[rank], (*BOUNDS, MAX_WORDS)[rank]
        return round(math.exp(self.rng.uniform(math.log(low), math.log(high - 0.5))))

    def setting(self) -> tuple[Pair, Pair, str]:
        names = Pair(self.people[0].name, self.people[1].name)
        scenario = self.fill(SETTINGS[self.genre], 0)
        return names, Pair(self.persona(0), self.persona(1)), scenario


def labelled_story(
    seed: int, balanced: float = 0.0, omit: float = 0.2, max_words: int = 420, max_turns: int = 16, requests: float = 0.0
) -> tuple[Story, list[str | None]]:
    """A story and one modifier per character reply.

    `balanced` is the share of labelled replies whose word budget is drawn evenly over the ten classes instead of from the
    natural distribution, which has few replies of the outer classes. Replies without modifier keep their natural length.
    `requests` is the share of user messages that end in a plain-language wish (REQUESTS), which the reply then follows.
    """
    w = Writer(seed)
    names, personas, scenario = w.setting()
    messages: list[Message] = []
    lengths: list[str | None] = []
    words, previous = 0, math.log(MEDIAN_WORDS)
    wish: int | None = None
    for turn in range(max_turns):
        who = 1 - turn % 2  # the user begins
        budget = w.budget(who, previous)
        if who == 0:
            labelled = w.rng.random() >= omit
            if labelled and w.rng.random() < balanced:
                budget = w.budget_of(w.rng.randrange(len(LENGTHS)))
            if wish is not None:
                budget, wish = w.budget_of(wish), None
        if turn >= 2 and who == 1 and words + budget > max_words:
            break
        text = w.message(who, budget)
        if who == 1 and requests and w.rng.random() < requests:
            wish = w.rng.randrange(len(LENGTHS))
            text = f"{text} {w.fill(w.rng.choice(REQUESTS[wish]), who)}"
        previous, words = math.log(count_words(text)), words + count_words(text)
        messages.append(Message("user" if who else "character", text))
        if who == 0:
            lengths.append(length_class(text) if labelled else None)
            if words > max_words:
                break
    if messages[-1].speaker == "user":
        messages.pop()
    return Story(names, personas, scenario, tuple(messages), source=f"generated:{seed}"), lengths


def make_story(seed: int, **kwargs) -> Story:
    """A story with natural reply lengths."""
    return labelled_story(seed, **kwargs)[0]
