"""A generator of small two-person stories: all the data that the offline profile needs.

Sentences are templates whose slots are carried by the people and the scene (a baker keeps talking about bread in her own
town), so a small model has something to learn from its context. Reply lengths are log-normal, as in human chats, and
shifted by how talkative the persona says the person is. The words of the ten length classes never describe anything here;
they occur only as grades on luggage tags, so that a base model has seen them without any relation to the length of a text.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

from helpers.lengths import BOUNDS, LENGTHS, count_words, length_class
from helpers.stories import Message, Pair, Story

MEDIAN_WORDS, SIGMA, MAX_WORDS = 19.0, 0.95, 260  # log-normal budget of a message
TALK_SHIFT = {"quiet": -0.6, "easy": 0.0, "talkative": 0.5}  # added to the log of the median

# fmt: off
SHE = "Adela Berit Carmen Delphine Edda Frieda Gudrun Halina Ilse Jovana Katya Linnea Mirela Noemi Odette Paloma Renata Sunniva Tamsin Ursula Verena Wanda Xenia Ysolde Zelda Anneke Bettina Corinna Dagny Elvira".split()
HE = "Alaric Bertil Cosmo Denis Eskil Florian Goran Henrik Ismael Joachim Karel Laszlo Milan Norbert Orlando Pascal Radek Stellan Tobias Umberto Valentin Wendel Xaver Yannis Zoltan Arvid Benno Ciro Dragan Enzo".split()
TOWNS = "Aldersund|Birkholm|Carrowmoor|Dellbrook|Eastmarch|Foxhaven|Gullhaven|Hollowell|Ironquay|Juniper Vale|Kingsferry|Larkstead|Millrace|Northam|Oxbow|Pebblecombe|Reedwater|Stonebridge|Tarnside|Westerlow".split("|")
JOBS = "baker|ferry pilot|bell founder|cartographer|cooper|florist|gardener|geologist|harbour clerk|ironmonger|joiner|lamp maker|librarian|locksmith|mail carrier|miller|nurse|organ builder|painter|piano tuner|potter|railway guard|ranger|sail maker|schoolteacher|shepherd|stonemason|surveyor|tailor|weaver".split("|")
TRAITS = "brave|calm|cautious|cheerful|clever|curious|dreamy|earnest|forgetful|friendly|generous|gentle|honest|kind|loyal|modest|neat|patient|playful|practical|proud|restless|shy|stubborn".split("|")
HOBBIES = "bird watching|board games|brass bands|chess|choir practice|country dances|crosswords|fishing|folk songs|ghost stories|kite flying|model boats|old maps|pickling plums|postcards|river swimming|star gazing|wood carving".split("|")
KEEPSAKES = "brass whistle|clay pipe|cloth map|copper ring|felt hat|glass marble|ivory comb|leather wallet|linen scarf|pocket knife|silver spoon|tin box|walking stick|wax seal".split("|")
COLOURS = "amber|black|blue|brown|copper|cream|green|grey|orange|pink|red|silver|white|yellow".split("|")
ADJECTIVES = "battered|bright|broken|careful|clean|cold|curious|dented|dusty|faded|fine|heavy|narrow|neat|odd|old|painted|plain|polished|quiet|rusty|smooth|strange|sturdy|warm|worn".split("|")
ADVERBS = "brightly|calmly|carefully|eagerly|firmly|gently|gladly|kindly|quickly|quietly|slowly|softly|thoughtfully|warmly".split("|")
SOUNDS = "a bell|a dog|a fiddle|a gull|a kettle|a mill wheel|a train|an owl|footsteps|laughter|rain|singing|thunder|water|the wind|wings".split("|")
SMELLS = "apples|bread|candle wax|cedar|cinnamon|coffee|hay|honey|lamp oil|mint|old paper|pine|rain|roses|salt|smoke|tar|wet wool".split("|")
WEATHER = "drizzle|evening light|fog|frost|mist|moonlight|rain|snow|sunshine|wind".split("|")
FOOD = "almond cake|apple pie|bean soup|black tea|cheese rolls|cherry jam|cocoa|corn bread|fish stew|ginger beer|oat biscuits|onion tart|pear juice|plum cake|potato soup|roast chestnuts".split("|")
ANIMALS = "cat|crow|dog|donkey|fox|goat|goose|heron|mule|owl|pony|raven".split("|")
FEELINGS = "amused|curious|glad|grateful|hopeful|hungry|nervous|proud|puzzled|relieved|sleepy|surprised|tired|worried".split("|")
TIMES = "after supper|at dawn|at midnight|at noon|before breakfast|before sunset|before the frost|before the storm|by Friday|this evening|today|tomorrow".split("|")
# fmt: on

SCENES = {
    "adventure": dict(
        place="the canyon bridge|the cedar hills|the cliff monastery|the drowned village|the fire tower|the glacier hut|the hidden bay|the ice cave|the old fort|the salt lake|the smugglers' path|the stone circle",
        spot="arch|boat|bridge|camp|cave|cliff|gate|ladder|pool|ridge|river|steps|tent|tunnel",
        thing="anchor|axe|banner|chart|chest|coin|compass|drum|flask|horn|key|lantern|log book|oar|rope|saddle|shovel|signal lamp|spyglass|stone",
        goal="cross the gorge|deliver the medicine|find the lost trail|light the beacon|map the valley|open the iron door|reach the summit|repair the raft|rescue the sheep|return the old crown",
    ),
    "mystery": dict(
        place="the assembly rooms|the bell tower|the city museum|the coach inn|the concert hall|the court archive|the grand hotel|the herb garden|the mail train|the manor house|the print shop|the sleeping car",
        spot="balcony|cabinet|cellar|corridor|desk|fireplace|hall|kitchen|landing|office|platform|shelf|staircase|window",
        thing="album|bottle|button|candle|clock|diary|envelope|glove|hat box|invoice|key|ledger|letter|mirror|necklace|photograph|receipt|ring|ticket|violin",
        goal="break the secret code|explain the empty safe|find the lost will|find the owner of the glove|learn who rang the bell|name the sender|question the night porter|recover the painting|search the cellar|trace the parcel",
    ),
    "daily life": dict(
        place="the allotments|the bakery|the bicycle shed|the boat yard|the bus depot|the corner shop|the county fair|the reading room|the school hall|the tea house|the town orchard|the village green",
        spot="bench|counter|door|fence|garden|oven|porch|shed|sink|stage|stall|stove|table|workbench",
        thing="apron|basket|bicycle|blanket|broom|cake tin|chair|cup|guitar|hammer|jar|kettle|kite|lamp|notebook|parcel|piano|radio|recipe|teapot",
        goal="bake for the fair|build a bookcase|clear the attic|fix the radio|hang the lamps|move the piano|paint the fence|pick the apples|plan the party|practise the duet",
    ),
}
for _scene in SCENES.values():
    for _key, _words in _scene.items():
        _scene[_key] = _words.split("|")

# Slots. {S} the speaker's name or pronoun at the start of a sentence, {s}/{p}/{o} she/her/her, {L} the listener, {thing} the
# current topic, {thing2} another thing, {spot}/{spot2} places in the scene; {l…} belong to the listener.
ACTIONS = """{S} picks up the {thing} and turns it {adv}.
{S} puts the {thing} on the {spot}.
{S} reaches for {p} {keep} and finds it gone.
{S} walks around the {spot} and counts {p} steps.
{S} wipes the {thing} with a {colour} cloth.
{S} looks under the {spot}, then behind the {spot2}.
{S} hands the {thing} to {L}.
{S} kneels beside the {spot} and listens.
{S} pours {food} for both of them.
{S} feeds the {animal} by the {spot}.
{S} draws a line from the {spot} to the {spot2}.
{S} carries the {adj} {thing2} over to the {spot}.
{S} leans on the {spot} and watches the {weather}.
{S} ties the {thing2} to the {spot} with {adj} string.
{S} shakes {p} head {adv}.
{S} sits down next to {L}.
{S} holds the {thing} up to the light.
{S} writes a note in the margin and underlines it.
{S} taps the {thing} and waits for an answer.
{S} buttons {p} coat against the {weather}.""".split("\n")
REMARKS = """"This {thing} came from the {spot}," {s} says.
"My first {ljob} friend had a {thing} like this," {s} says {adv}.
"We should {goal} {time}," {s} says.
"In {town} we would call that a {adj} {thing}," {s} says.
"I feel {feel}, and I think you do too," {s} says.
"You see better than I do, {L}," {s} says.
"The {spot} first, then the {spot2}," {s} decides.
"There is {colour} paint on the {thing}," {s} says {adv}.
"A {job} learns to wait," {s} says.
"Take the {thing2}, and I will bring the {thing}," {s} offers.
"Somebody moved the {thing2} {time}," {s} says.
"I promised to {goal}, and I will," {s} says {adv}.
"I can hear {sound} behind the {spot}," {s} whispers.
"People in {ltown} are {ltrait}, I have heard," {s} says.
"I would trade my {keep} for some {food}," {s} says.
"That is the {adj} {thing} from the letter," {s} says.
"Let us begin at the {spot}," {s} says.
"It smells of {smell} near the {spot2}," {s} says {adv}.""".split("\n")
QUESTIONS = '''"Where did you find the {thing}, {L}?"
"Who left the {thing2} at the {spot}?" {s} asks.
"Can a {ljob} repair a {thing}?" {s} asks {adv}.
"Shall we {goal} {time}?"
"Do you smell {smell}?" {s} asks.
"Is that {sound}?" {s} asks {adv}.
"Have you eaten any {food} today?"
"Why is the {thing} so {adj}?" {s} wonders.
"Were you {feel} when you left {ltown}?" {s} asks.
"May I borrow the {thing2}?"
"What would they say in {town}?" {s} asks.
"Which way to the {spot2}?"'''.split("\n")
SCENERY = """The {weather} drifts past the {spot}.
The {thing} is {adj} and smells of {smell}.
A {animal} sleeps beside the {spot}.
Far away there is {sound}.
The {spot2} looks {colour} in the {weather}.
Dust lies on the {thing2}.
Near the {spot} stands a {adj} {colour} box.
The tag on the {thing2} says (grade = {tag}).
Light falls through the {spot} onto the {thing}.
The whole of {place} seems {adj} today.
Between the {spot} and the {spot2} runs a {colour} thread.
The air tastes of {smell} and {smell2}.""".split("\n")
THOUGHTS = """{S} thinks of {town} and of {hobby}.
{S} remembers a {adj} {thing} from years ago.
{S} is {feel}, but keeps quiet about it.
{S} wonders what {L} knows about the {thing}.
As a {job}, {s} has seen stranger things.
{S} is too {trait} to give up now.
{S} likes how {ltrait} {L} is.
The {keep} in {p} pocket feels {adj}.
{S} wants to {goal}, and nothing else.
{S} has never trusted a {adj} {thing2}.
{S} imagines {L} at home in {ltown}.
{S} hopes that the {spot} will hold.""".split("\n")
REACTIONS = """"The {thing}, yes," {s} says.
{S} looks at the {thing} again.
"Then the {thing} stays with us," {s} says {adv}.
"I wondered about the {thing} too," {s} says.
{S} turns to {L} at the word {thing}.
"Careful with that {thing}," {s} says.
"So it is about the {thing}," {s} says.
{S} smiles {adv} and takes the {thing}.""".split("\n")
BRIEF = """"Yes."
"No."
"Really?"
"Good."
"Certainly, {L}."
"The {thing}?"
"Not yet."
"Thank you, {L}."
"Look here."
{S} nods.
{S} laughs.
{S} waits.
{S} nods {adv}.
"After you, {L}."
"Try the {spot}."
"I am {feel}."
"What a {thing}!"
"Wait for me."
{S} points at the {spot}.
"More {food}?"
"Tomorrow, perhaps."
"Quiet, {L}."
"That is enough."
"Tell me more.\"""".split("\n")
TAILS = [
    " while {L} watches the {spot2}",
    " and thinks of {town}",
    " as {sound} stops",
    " before the {weather} comes back",
    " with the {keep} in one hand",
    " and hums one of {p} songs",
]
SETTINGS = {
    "adventure": "{C} and {U} travel to {place} to {goal} {time}. They have a {adj} {thing}, a {thing2} and some {food}.",
    "mystery": "A {adj} {thing} turns up at {place}. {U} asks {C} to help {goal} {time}, with a {colour} {thing2} as the one clue.",
    "daily life": "{C} and {U} meet at {place} to {goal} {time}. On the {spot} are a {adj} {thing}, a {thing2} and {food}.",
}
TALK = {
    "quiet": ("{N} says little.", "{N} is a person of few words.", "{N} prefers to listen."),
    "easy": ("{N} is good company.", "{N} likes a chat.", "{N} is easy to talk to."),
    "talkative": ("{N} loves to tell stories.", "{N} explains everything in detail.", "{N} can talk for hours."),
}

# What people say when they want a reply of some length, and how many words they then get. Only the base model's second phase
# reads these: a real base model has seen people ask each other to be brief, and so should this one.
REQUESTS = (
    (1, 3, ('"Yes or no, {L}?"', '"One word, please."', '"Just answer me."')),
    (4, 9, ('"Be quick, {L}."', '"In few words, please."', '"Keep it brief."')),
    (10, 20, ('"One sentence, {L}."', '"Answer in a sentence or two."', '"Put it simply."')),
    (21, 45, ('"Explain it to me, {L}."', '"Tell me a little more."', '"And then?"')),
    (46, 95, ('"Tell me properly, {L}."', '"I have time, go on."', '"Describe it to me."')),
    (96, 250, ('"Tell me everything, {L}."', '"The whole story, please."', '"Leave nothing out."')),
)
# The second phase also gives the ten grades their order, in pounds: words that only ever stand in each other's place end up
# with nearly equal embeddings, and no adapter on frozen embeddings could then tell them apart.
GRADED = (
    "The tag on the {thing2} says (grade = {tag}), which is {pounds} pounds.",
    "Near the {spot} stands a box of {pounds} pounds with the tag (grade = {tag}).",
)


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

    def __init__(self, seed: int, graded: bool = False):
        self.rng = rng = random.Random(seed)
        self.scenery = SCENERY + list(GRADED) * 3 if graded else SCENERY
        self.genre = rng.choice(list(SCENES))
        scene = SCENES[self.genre]
        self.place, self.goal = rng.choice(scene["place"]), rng.choice(scene["goal"])
        self.things, self.spots = rng.sample(scene["thing"], 6), rng.sample(scene["spot"], 4)
        self.time, self.weather = rng.choice(TIMES), rng.choice(WEATHER)
        self.food, self.animal = rng.choice(FOOD), rng.choice(ANIMALS)
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

    def fill(self, template: str, who: int, pronoun: bool = False) -> str:
        """A template as a sentence spoken or done by person `who`."""
        rng, me, you = self.rng, self.people[who], self.people[1 - who]
        spot, spot2 = rng.sample(self.spots, 2)
        smell, smell2 = rng.sample(SMELLS, 2)
        if "{pounds}" in template:
            grade = rng.randrange(len(LENGTHS))
            pounds = round(3 * 1.6**grade * math.exp(rng.gauss(0, 0.12)))
            template = template.replace("{pounds}", str(pounds)).replace("{tag}", LENGTHS[grade])
        text = template.format(
            S=me.she.capitalize() if pronoun else me.name, s=me.she, p=me.her, L=you.name, C=self.people[0].name, U=self.people[1].name,
            thing=self.topic, thing2=rng.choice([t for t in self.things if t != self.topic]), spot=spot, spot2=spot2,
            adv=rng.choice(ADVERBS), adj=rng.choice(ADJECTIVES), colour=rng.choice(COLOURS), sound=rng.choice(SOUNDS), smell=smell, smell2=smell2,
            weather=self.weather if rng.random() < 0.7 else rng.choice(WEATHER), food=self.food if rng.random() < 0.7 else rng.choice(FOOD),
            animal=self.animal, feel=rng.choice(FEELINGS), time=self.time if rng.random() < 0.7 else rng.choice(TIMES),
            job=me.job, town=me.town, hobby=me.hobby, keep=me.keepsake, trait=rng.choice(me.traits),
            ljob=you.job, ltown=you.town, ltrait=rng.choice(you.traits), goal=self.goal, place=self.place, tag=rng.choice(LENGTHS),
        )  # fmt: skip
        return _capitalise(text)

    def message(self, who: int, budget: int) -> str:
        """About `budget` words (at most two off), in sentences, with a blank line now and then."""
        rng, out, left, previous, run = self.rng, [], budget, "", 0
        while left > 0 and (left > 2 or not out):
            if left <= 8:
                pool = BRIEF if left < 6 or rng.random() < 0.5 else REACTIONS + QUESTIONS
            elif not out and rng.random() < 0.6:
                pool = REACTIONS
            else:
                pool = rng.choices((ACTIONS, REMARKS, QUESTIONS, self.scenery, THOUGHTS, BRIEF), (5, 6, 2, 3, 3, 1))[0]
            for _ in range(30):  # the longest that fits is not wanted, any that fits is
                template = rng.choice(pool)
                sentence = self.fill(template, who, pronoun=bool(out) and rng.random() < 0.6)
                if template != previous and count_words(sentence) <= left + (0 if out else 1):
                    break
            else:
                if out:
                    break
                sentence = rng.choice(('"Yes."', '"No."', '"Good."'))
            previous = template
            if pool in (ACTIONS, THOUGHTS) and left > 25 and rng.random() < 0.3:
                tail = self.fill(rng.choice(TAILS), who, pronoun=True)
                sentence = sentence[:-1] + tail + "."
            run += 1
            paragraph = run > 4 and left > 15 and rng.random() < 0.35
            out.append(("\n\n" if paragraph else " " if out else "") + sentence)
            run = 0 if paragraph else run
            left -= count_words(sentence)
            if rng.random() < 0.12:
                self.topic = rng.choice(self.things)
        return "".join(out)

    def budget(self, who: int, previous: float) -> int:
        """Words of the next message: log-normal, shifted by talkativeness, pulled a little to the message before."""
        median = math.log(MEDIAN_WORDS) + TALK_SHIFT[self.people[who].talk] - (0.35 if who == 1 else 0.0)
        median += 0.2 * (previous - median)
        return max(1, min(MAX_WORDS, round(math.exp(self.rng.gauss(median, SIGMA)))))

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
    w = Writer(seed, graded=requests > 0)
    names, personas, scenario = w.setting()
    messages: list[Message] = []
    lengths: list[str | None] = []
    words, previous = 0, math.log(MEDIAN_WORDS)
    wish: tuple[int, int] | None = None
    for turn in range(max_turns):
        who = 1 - turn % 2  # the user begins
        budget = w.budget(who, previous)
        if who == 0:
            labelled = w.rng.random() >= omit
            if labelled and w.rng.random() < balanced:
                low, high = w.rng.choice(list(zip((1, *BOUNDS), (*BOUNDS, MAX_WORDS), strict=True)))
                budget = round(math.exp(w.rng.uniform(math.log(low), math.log(high - 0.5))))
            if wish:
                budget, wish = round(math.exp(w.rng.uniform(math.log(wish[0]), math.log(wish[1])))), None
        if turn >= 2 and who == 1 and words + budget > max_words:
            break
        text = w.message(who, budget)
        if who == 1 and requests and w.rng.random() < requests:
            low, high, sentences = w.rng.choice(REQUESTS)
            text, wish = f"{text} {w.fill(w.rng.choice(sentences), who)}", (low, high)
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
