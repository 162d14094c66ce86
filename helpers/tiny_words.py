"""The words and sentences of the story generator (`tiny_stories`): people, scenes, templates.

A reply of more than thirty words is told in paragraphs, each with its marker ("First", "Then", … "In the end"): so a small
model can see how far it has come, which it could not by counting a hundred words.
"""

from __future__ import annotations

# fmt: off
SHE = ["Adela", "Berit", "Carmen", "Delphine", "Edda", "Frieda", "Gudrun", "Halina", "Ilse", "Jovana", "Katya", "Linnea", "Mirela", "Noemi", "Odette", "Paloma", "Renata", "Sunniva", "Tamsin", "Ursula", "Verena", "Wanda", "Xenia", "Ysolde", "Zelda", "Anneke", "Bettina", "Corinna", "Dagny", "Elvira"]
HE = ["Alaric", "Bertil", "Cosmo", "Denis", "Eskil", "Florian", "Goran", "Henrik", "Ismael", "Joachim", "Karel", "Laszlo", "Milan", "Norbert", "Orlando", "Pascal", "Radek", "Stellan", "Tobias", "Umberto", "Valentin", "Wendel", "Xaver", "Yannis", "Zoltan", "Arvid", "Benno", "Ciro", "Dragan", "Enzo"]
TOWNS = ["Aldersund", "Birkholm", "Carrowmoor", "Dellbrook", "Eastmarch", "Foxhaven", "Gullhaven", "Hollowell", "Ironquay", "Juniper Vale", "Kingsferry", "Larkstead", "Millrace", "Northam", "Oxbow", "Pebblecombe", "Reedwater", "Stonebridge", "Tarnside", "Westerlow"]
JOBS = ["baker", "ferry pilot", "bell founder", "cartographer", "cooper", "florist", "gardener", "geologist", "harbour clerk", "ironmonger", "joiner", "lamp maker", "librarian", "locksmith", "mail carrier", "miller", "nurse", "organ builder", "painter", "piano tuner", "potter", "railway guard", "ranger", "sail maker", "schoolteacher", "shepherd", "stonemason", "surveyor", "tailor", "weaver"]
TRAITS = ["brave", "calm", "cautious", "cheerful", "clever", "curious", "dreamy", "earnest", "forgetful", "friendly", "generous", "gentle", "honest", "kind", "loyal", "modest", "neat", "patient", "playful", "practical", "proud", "restless", "shy", "stubborn"]
HOBBIES = ["bird watching", "board games", "brass bands", "chess", "choir practice", "country dances", "crosswords", "fishing", "folk songs", "ghost stories", "kite flying", "model boats", "old maps", "pickling plums", "postcards", "river swimming", "star gazing", "wood carving"]
KEEPSAKES = ["brass whistle", "clay pipe", "cloth map", "copper ring", "felt hat", "glass marble", "ivory comb", "leather wallet", "linen scarf", "pocket knife", "silver spoon", "tin box", "walking stick", "wax seal"]
COLOURS = ["amber", "black", "blue", "brown", "copper", "cream", "green", "grey", "orange", "pink", "red", "silver", "white", "yellow"]
ADJECTIVES = ["battered", "bright", "broken", "careful", "clean", "cold", "curious", "dented", "dusty", "faded", "fine", "heavy", "narrow", "neat", "odd", "old", "painted", "plain", "polished", "quiet", "rusty", "smooth", "strange", "sturdy", "warm", "worn"]
ADVERBS = ["brightly", "calmly", "carefully", "eagerly", "firmly", "gently", "gladly", "kindly", "quickly", "quietly", "slowly", "softly", "thoughtfully", "warmly"]
SOUNDS = ["a bell", "a dog", "a fiddle", "a gull", "a kettle", "a mill wheel", "a train", "an owl", "laughter", "rain", "singing", "thunder", "water", "the wind"]
SMELLS = ["apples", "bread", "candle wax", "cedar", "cinnamon", "coffee", "hay", "honey", "lamp oil", "mint", "old paper", "pine", "rain", "roses", "salt", "smoke", "tar", "wet wool"]
WEATHER = ["drizzle", "evening light", "fog", "frost", "mist", "moonlight", "rain", "snow", "sunshine", "wind"]
FOOD = ["almond cake", "apple pie", "bean soup", "cheese rolls", "cherry jam", "corn bread", "fish stew", "oat biscuits", "onion tart", "plum cake", "potato soup", "roast chestnuts"]
DRINKS = ["apple juice", "black tea", "cocoa", "ginger beer", "malt coffee", "mint tea", "pear juice", "water"]
ANIMALS = ["cat", "crow", "dog", "donkey", "fox", "goat", "goose", "heron", "mule", "owl", "pony", "raven"]
FEELINGS = ["amused", "curious", "glad", "grateful", "hopeful", "hungry", "nervous", "proud", "puzzled", "relieved", "sleepy", "surprised", "tired", "worried"]
TIMES = ["after supper", "at dawn", "at midnight", "at noon", "before breakfast", "before sunset", "before the frost", "before the storm", "by Friday", "this evening", "today", "tomorrow"]
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

# Slots. {S} the speaker's name, or pronoun, at the start of a sentence; {H}/{s}/{p} She/she/her; {L} the listener; {thing} the
# current topic, {thing2} another thing; {spot}, {spot2} places in the scene; {l…} belong to the listener; {M} a marker of STAGES.
# A template keeps to one of three sizes, whatever fills its slots: BRIEF 1-4 words, PLAIN 5-8, FULL 9-13.
BRIEF = [
    '"Yes."',
    '"No."',
    '"Really?"',
    '"Good."',
    '"Certainly, {L}."',
    '"The {thing}?"',
    '"Not yet."',
    '"Thank you, {L}."',
    '"Look here."',
    "{S} nods.",
    "{S} laughs.",
    "{S} waits.",
    "{S} nods {adv}.",
    "{S} smiles {adv}.",
    '"After you, {L}."',
    '"Try the {spot}."',
    '"I am {feel}."',
    '"What a {thing}!"',
    '"Wait for me."',
    "{S} looks up.",
    '"More {drink}?"',
    '"Tomorrow, perhaps."',
    '"Quiet, {L}."',
    '"That is enough."',
    '"Tell me more."',
    '"As you like."',
    '"Never, {L}."',
    '"Give it here."',
]
PLAIN = [
    "{S} points {adv} at the {spot}.",
    "{S} puts the {thing} down {adv}.",
    "{S} shakes {p} head at the {thing}.",
    "{S} turns the {thing} over {adv}.",
    "{S} smiles and gives {L} the {thing}.",
    "{S} looks {adv} behind the {spot}.",
    "{S} sits down next to {L}.",
    "{S} pours a cup of {drink}.",
    "{S} is {feel} and says so.",
    "{S} has no answer to that.",
    "{S} reaches for the {thing} {adv}.",
    '"Careful with that {thing}, {L}."',
    '"Where did you find the {thing}?"',
    '"Who left the {thing2} there, {L}?"',
    '"Can a {ljob} repair a {thing}?"',
    '"Do you smell {smell} too, {L}?"',
    '"May I borrow the {thing2}, please?"',
    '"Which way to the {spot2}, {L}?"',
    '"The {spot} first, then the {spot2}."',
    '"I know that {thing} from {town}."',
    '"Nobody in {ltown} would believe it."',
    '"I can hear {sound}, {L}."',
    '"My {keep} is gone again."',
    '"That is a {adj} {thing}, {L}."',
    '"I was never so {feel}, {L}."',
    '"You are too {ltrait} for this."',
    '"Then the {thing} stays with us."',
    '"The {thing}, yes," {s} says {adv}.',
    '"Ask a {ljob}," {s} says {adv}.',
    '"So it is about the {thing}."',
    "The {animal} by the {spot} wakes up.",
    "The {thing} is {adj} and {colour}.",
    "A {animal} watches from the {spot}.",
    "There is dust on the {thing2}.",
    "{S} wonders about the {thing} again.",
    '"Have you eaten anything today, {L}?"',
]
FULL = [
    "{S} looks under the {spot}, then behind the {spot2}, and finds nothing.",
    "{S} walks once around the {spot} and counts {p} steps {adv}.",
    "{S} wipes the {thing} with a {colour} cloth and holds it up.",
    "{S} kneels down beside the {spot}, because there is {sound}.",
    "{S} takes the {thing} from {L} and turns it to the light.",
    "{S} leans on the {spot} and watches how the {weather} goes by.",
    "{S} ties the {thing2} to the {spot} with a {colour} string.",
    "{S} gives the {animal} some {food} before {s} says anything.",
    "{S} buttons {p} coat against the {weather} and takes the {thing2}.",
    "{S} writes a note about the {thing} and underlines it {adv}.",
    "{S} carries the {adj} {thing2} over to the {spot} with both hands.",
    "{S} feels for the {keep} in {p} pocket and looks {feel}.",
    '"We could {goal} {time}," {s} says {adv}.',
    '"In {town} we would call that a {adj} {thing}," {s} says.',
    '"My first {ljob} friend had a {thing} like this," {s} says.',
    '"Somebody moved the {thing2} from the {spot} to the {spot2}," {s} says.',
    '"Take the {thing2}, {L}, and I take the {thing}," {s} says.',
    '"A {job} learns to wait, and so I wait," {s} says {adv}.',
    '"There is {colour} paint on the {thing}, quite fresh," {s} says.',
    '"It smells of {smell} near the {spot2}, does it not?" {s} asks.',
    '"I promised to {goal}, {L}," {s} says.',
    '"Why did you ever leave {ltown}, {L}?" {s} asks {adv}.',
    '"What would a {ljob} do with such a {thing}?" {s} asks.',
    '"I would trade my {keep} for some {food} now," {s} says.',
    '"I wondered about the {thing} too, {L}," {s} says {adv}.',
    '"So it is about the {thing} after all," {s} says {adv}.',
    '"People in {ltown} are {ltrait}, or so I have heard," {s} says.',
    '"You see better than I do, {L}," {s} says {adv}.',
    "As a {job}, {s} has seen a {thing} like this before.",
    "{S} thinks of {town} and of {hobby}, and is {feel} again.",
    "{S} likes how {ltrait} {L} is, but {s} does not say so.",
    "{S} remembers a {adj} {thing} from {p} first years in {town}.",
    "{S} is too {trait} to give up now, and {L} knows it.",
    "Between the {spot} and the {spot2} the ground is {colour} with dust.",
    "The {weather} comes in by the {spot} and smells of {smell}.",
    "The tag on the {thing2} says (grade = {tag}), {weight}.",
    "By the {spot} lies a tag: (grade = {tag}), {order}.",
    '"I see a tag: (grade = {tag}), {weight}," {s} says.',
]

# A reply of more than thirty words is told in paragraphs: a lead, then step after step, each with its marker. As in a real
# story, how far it has come can be read off the text itself; a small model could not count a hundred words, but it sees that.
LEADS = [
    '"Listen, {L}," {s} says, and sits down by the {spot} with {p} {keep}.',
    '"Let us do this properly, {L}," {s} says {adv}, and looks around.',
    '"There is more to it, {L}," {s} says {adv}, and puts down the {thing2}.',
    '"Come with me, {L}, and bring the {thing2}," {s} says {adv}.',
    '"Then watch, {L}," {s} says {adv}, and picks up the {thing} again.',
    "{S} takes a deep breath, picks up the {thing} and looks at {L}.",
    '{S} rolls up {p} sleeves and looks around. "Well, {L}," {s} says.',
    '{S} lays {p} {keep} by the {spot}. "Now, {L}," {s} says, and begins.',
    '{S} drinks some {drink} and makes up {p} mind. "Yes, {L}," {s} says.',
    "{S} takes {L} by the arm and points {adv} at the {spot}.",
    "{S} thinks about the {thing} for a while, and then {s} nods {adv}.",
]
STAGES = (
    ("First", "To begin with,"),
    ("Then", "Next"),
    ("After that", "A moment later"),
    ("Soon", "By and by"),
    ("A little later", "Ten minutes later"),
    ("Half an hour later", "An hour later"),
    ("At last", "Towards the end"),
    ("In the end", "Finally"),
    ("And so", "Only now"),
)
PARAGRAPHS = [
    '{M} {n} goes over to the {spot} with the {thing}. It is {adj} there and smells of {smell}. "Here," {s} says, "this is the place."',
    "{M} {n} takes the {thing} to the {spot}. The light is better there. {H} sees {colour} paint on it and scratches {adv}.",
    "{M} {n} holds the {thing} against the {spot}. It does not fit. {H} puts it down and thinks of {town} for a while.",
    '{M} {n} calls from the {spot}. "There is something {adj} behind it, {L}," {s} says {adv}. "Bring the {thing2}, and we will see."',
    '{M} {n} tells of {town} and of {hobby}. "A {job} needs something to do on Sundays," {s} says, and looks {feel}.',
    '{M} {n} lifts the {thing2} onto the {spot}. It is heavier than it looks. "Now you, {L}," {s} says, and rests.',
    "{M} there is {sound}, and {n} stops at the {spot}. {H} hardly breathes. It is only the {animal}, and {s} laughs {adv}.",
    '{M} {n} holds out the {thing2} to {L}. "Not so high," {s} says, "and mind the {spot}." It works {adv} enough.',
    "{M} {n} finds a {adj} {thing2} under the {spot}. The tag on it says (grade = {tag}), {weight}, and {s} nods.",
    "{M} {n} turns the {thing2} around. There is a {colour} tag on it: (grade = {tag}), {order}. {H} is {feel}.",
    '{M} {n} finds a note by the {spot}. It is {colour} and smells of {smell}. "I cannot read it," {s} says, and is {feel}.',
    "{M} the {weather} comes in, and {n} moves to the {spot}. It is warm and dry. {H} shares {p} {food} with {L}.",
    '{M} {n} tries the {spot}, as a {job} would. It gives a little. "You are {ltrait}, {L}," {s} says, "so push with me."',
    '{M} {n} rests by the {spot} with some {food}. "I have not eaten so well since {town}," {s} says, and looks {feel}.',
    '{M} {n} draws the way from the {spot} to the {spot2}. "Here we are," {s} says, "and there is the {thing2}."',
    "{M} the {animal} runs past them to the {spot}. {S} follows it and comes back with the {thing2}. It is {adj}, but whole.",
    '{M} {n} counts what they have: the {thing}, the {thing2} and a {keep}. "It will do," {s} says, "if we are careful."',
    '{M} {n} remembers the {adj} {thing} in {town}. It stood by a {spot}, too. "{L}," {s} says, "I think it is the same."',
    '{M} {n} looks at {L} and is {feel}. "We came to {goal}," {s} says, "and we are nearly there."',
    "{M} {n} lights a lamp at the {spot}. Everything looks {colour} now. Far away there is {sound}, and then it is still.",
    '{M} {n} knocks at the {spot} and waits. Nobody comes. "Then we do it ourselves, {L}," {s} says, and takes the {thing2}.',
    "{M} {n} cleans the {thing} with a little {drink}. It helps. Under the dirt it is {colour}, and {s} can read a name.",
    '{M} {n} ties the {thing2} to the {spot} and pulls at it {adv}. "A {ljob} knows about knots, {L}," {s} says. It holds.',
    '{M} {n} pours some {drink} and gives {L} half. "You have been {ltrait} all day," {s} says, and looks at the {spot}.',
    '{M} {n} changes places with {L} at the {spot}. "You take the {thing}," {s} says, "and I take the {thing2}." It goes better.',
    '{M} {n} opens the {thing2} and looks inside. There is nothing but dust and {smell}. "Somebody was here before us," {s} says {adv}.',
    '{M} {n} listens at the {spot}. "That is {sound}," {s} says, "or a very {adj} {animal}." {H} is {feel}, but {s} stays.',
    '{M} {n} asks about {ltown}. "Is a {ljob} happy there?" {s} wants to know, and puts the {thing} on the {spot}.',
    '{M} {n} writes it all down: the {spot}, the {thing} and the {thing2}. "In {town} they will laugh," {s} says {adv}.',
]

# Sentences of a reply by its length class, from the shortest on; then paragraphs after the lead, fewest and most.
SHAPES = (
    ((BRIEF,),),
    ((PLAIN,),),
    ((FULL,), (FULL,), (FULL,), (BRIEF, PLAIN)),
    ((PLAIN, FULL), (FULL, PLAIN)),
    ((PLAIN, FULL, PLAIN), (FULL, PLAIN, PLAIN), (PLAIN, PLAIN, FULL)),
)
STEPS = ((1, 1), (2, 2), (3, 3), (4, 5), (6, 9))

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

# What people say when they want a reply of some length: ten kinds of wishes, one for each class. Only the base model reads
# these: a real base model has seen people ask each other to be brief, or to tell everything, and so should this one.
REQUESTS = (
    ('"Yes or no, {L}?"', '"One word, please."', '"Just answer me, {L}."'),
    ('"Be quick, {L}."', '"In few words, please."', '"Keep it brief."'),
    ('"One sentence, {L}."', '"Put it simply, {L}."', '"Say it plainly."'),
    ('"A sentence or two, please."', '"Be a little clearer, {L}."', '"Why, {L}?"'),
    ('"Explain it to me, {L}."', '"Say some more about it."', '"How do you mean that?"'),
    ('"How would you begin, {L}?"', '"Show me the first step."', '"Make a start, {L}."'),
    ('"And what comes next, {L}?"', '"Tell me properly, {L}."', '"Show me how it goes on."'),
    ('"I have time, {L}, go on."', '"Describe it to me, {L}."', '"I want to see how you do it."'),
    ('"Take all evening, {L}."', '"Tell me all about it."', '"I could listen for hours, {L}."'),
    ('"Tell me everything, {L}."', '"The whole story, please."', '"Leave nothing out, {L}."'),
)
