"""The demo's data: six small question tasks, generated here, each with disjoint train and test splits.

Two tasks are easy (`sentiment`, `topic`: one word in the sentence decides), one asks for facts of an invented
world (`fact`: there are many, and the model is small), two follow a rule (`plural`, `odd_one_out`).
`odd_of_six` is `odd_one_out` with six words instead of four. The model is not trained on it, not even on its `train`
documents (these are for shots and stoppers), so it is the hardest.
A document's split is a fixed hash of the document, so it depends on no random state and on no other document.
`fact` holds out wordings: a fact cannot be guessed, so every fact asked in `test` is also asked in `train`, in
other words. The rule tasks hold out the case itself, in every wording: nothing of it is in `train`.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterable, Iterator

import datasets

TASKS: tuple[str, ...] = ("sentiment", "topic", "fact", "plural", "odd_one_out", "odd_of_six")

TEST_DOCUMENTS = 320
"""At most this many test documents a task; held-out documents beyond it are dropped, never trained on."""

Row = tuple[str, str, list[str], str]
"""Question, answer, choices, and the key whose hash decides the split."""

POSITIVE = (
    "wonderful superb delightful brilliant charming excellent lovely fantastic amazing great pleasant splendid"
    " perfect beautiful enjoyable marvellous thrilling touching clever funny magnificent impressive graceful"
    " refreshing inspired gripping stunning generous warm elegant"
).split()
NEGATIVE = (
    "awful terrible boring dreadful horrible dull poor disappointing clumsy tedious nasty ugly annoying bad weak"
    " miserable shabby painful stale lifeless dreary hopeless messy bland rude broken gloomy pathetic shallow"
    " forgettable"
).split()
REVIEWED = (
    "film book play concert hotel meal song show novel story actor ending service room garden tour museum painting"
    " market speech lesson game picnic party journey"
).split()
SENTIMENT_TEMPLATES = (
    "The {n} was {a}.",
    "What a {a} {n} that was!",
    "I found the {n} {a} and the {m} {b}.",
    "My sister said the {n} was {a}.",
    "We went on Monday and the {n} was truly {a}.",
    "It was a {a} {n} with a {b} {m}.",
    "Everyone at the {m} called the {n} {a}.",
    "The {n} by the river is {a}, simply {a}.",
)

TOPIC_WORDS = {
    "sports": "goal match team coach striker stadium league referee tournament runner race trophy player penalty",
    "food": "soup bread cheese recipe oven butter sauce cake dinner kitchen pepper salad cook flour",
    "weather": "rain snow storm cloud wind sunshine fog thunder frost drizzle hail breeze heatwave blizzard",
    "money": "bank loan tax price profit salary debt market coin budget wage interest invoice investor",
}
TOPIC_TEMPLATES = (
    "Our {p} talked about the {w} all morning.",
    "The {w} and the {v} surprised a {p} in the village.",
    "My {p} wrote a long letter on the {w}.",
    "The {p} never expected such a {w}.",
    "Our {p} brought news of the {w} and of the {v}.",
    "In the evening a {p} complained about the {w}.",
    "A {p} asked what the {w} had to do with the {v}.",
    "Yesterday the {w} was better than the {v}, said my {p}.",
)
TELLERS = "uncle aunt neighbour teacher friend brother cousin grandmother doctor farmer tailor painter".split()

CATEGORIES = {
    "animal": "dog cat horse cow sheep goat lion tiger bear wolf fox rabbit mouse monkey camel deer",
    "fruit": "apple pear plum peach cherry grape lemon orange banana melon fig mango lime apricot date kiwi",
    "tool": "hammer saw drill spade rake chisel axe wrench shovel file knife needle brush ladder pliers nail",
    "clothing": "shirt coat hat glove sock shoe scarf dress skirt belt jacket boot tie vest apron cap",
    "vehicle": "car bus train boat ship plane bicycle truck tram van wagon taxi ferry sledge canoe tractor",
    "furniture": "chair table bed desk sofa shelf bench stool cupboard wardrobe couch cradle drawer mirror lamp rug",
}
ODD_TEMPLATES = ("Which does not belong: {}?", "Find the odd one out: {}.")

RELATIONS = {
    "metal": ("tin iron copper gold silver zinc lead nickel", "is mined in {}", "do they mine in {}"),
    "colour": ("red blue green white black yellow purple brown", "is the flag of {}", "do they fly in {}"),
    "beast": ("owl eagle otter swan badger falcon heron stag", "guards {}", "is the sign of {}"),
    "drink": ("tea cider milk cocoa wine beer juice coffee", "is sold in {}", "do they pour in {}"),
}
FACT_TEMPLATES = ("Which {r} {p}?", "What {r} {q}?", "Name the {r} that {p}.", "Say which {r} {p}.")
HOME_TEMPLATES = ("Where does {} live?", "In which town is {} at home?", "Name the town of {}.", "Where is {} from?")
TOWNS, PEOPLE = 160, 320


@functools.cache
def load(task: str) -> datasets.DatasetDict:
    """Generate one task; later calls give the same object.

    Args:
        task: one of `TASKS`.

    Returns:
        splits `train` and `test` with columns `question`, `answer` and `choices` (empty where the answer is free).

    Raises:
        ValueError: there is no such task.
    """
    if task not in TASKS:
        raise ValueError(f"No demo task {task!r}; there are {', '.join(TASKS)}.")
    features = datasets.Features(
        question=datasets.Value("string"),
        answer=datasets.Value("string"),
        choices=datasets.Sequence(datasets.Value("string")),  # List, which datasets before 4 has not
    )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {
                    "question": [row[0] for row in rows],
                    "answer": [row[1] for row in rows],
                    "choices": [row[2] for row in rows],
                },
                features=features,
            )
            for split, rows in zip(("train", "test"), _split(task, _GENERATORS[task]()), strict=True)
        }
    )


def prompt(question: str) -> str:
    """Give the context of a question, as the model was trained on it and as the task files write it."""
    return f"Q: {question}\nA:"


def _split(task: str, rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Drop repeated questions, then part the rows by the hash of their key."""
    unique = {row[0]: row for row in rows}
    train: list[Row] = []
    held_out: list[Row] = []
    for row in unique.values():
        (held_out if _hash(f"{task}:{row[3]}") % 100 < _TEST_PERCENT[task] else train).append(row)
    # In hash order rather than in generation order: `--limit` then takes a fair sample.
    held_out.sort(key=lambda row: _hash(row[0]))
    train.sort(key=lambda row: _hash(row[0]))
    return train, held_out[:TEST_DOCUMENTS]


def _hash(text: str) -> int:
    """Hash a text to the same number in every process (`hash` is salted)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _rng(name: str) -> random.Random:
    return random.Random(f"lm-eval-adainfer demo {name}")


def _sentiment() -> Iterator[Row]:
    rng = _rng("sentiment")
    for _ in range(9000):
        answer, words = rng.choice([("positive", POSITIVE), ("negative", NEGATIVE)])
        (n, m), (a, b) = rng.sample(REVIEWED, 2), rng.sample(words, 2)
        question = rng.choice(SENTIMENT_TEMPLATES).format(n=n, m=m, a=a, b=b)
        yield question, answer, ["negative", "positive"], question


def _topic() -> Iterator[Row]:
    rng = _rng("topic")
    for _ in range(9000):
        answer = rng.choice(list(TOPIC_WORDS))
        w, v = rng.sample(TOPIC_WORDS[answer].split(), 2)
        question = rng.choice(TOPIC_TEMPLATES).format(w=w, v=v, p=rng.choice(TELLERS))
        yield question, answer, list(TOPIC_WORDS), question


@functools.cache
def world() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Invent the world of the facts: each town's metal, colour, beast and drink, and each person's town."""
    rng = _rng("world")
    towns = _names(rng, "br d gr k l m n p r st t v".split(), "a e i o u".split(), "ton mere holm wick by".split())
    people = _names(rng, "al be ca da el fi ja ko li mi no or pe ru sa ti ve wy ze".split(),
                    "l m n r s v".split(), "an ia o en u a ey".split())  # fmt: skip
    facts = {town: {r: rng.choice(of[0].split()) for r, of in RELATIONS.items()} for town in towns[:TOWNS]}
    # Every town has as many people as every other, so that no town is the best guess.
    return facts, {person: towns[i % TOWNS] for i, person in enumerate(people[:PEOPLE])}


def _names(rng: random.Random, *parts: list[str]) -> list[str]:
    """All names of the given parts, shuffled."""
    names = [""]
    for part in parts:
        names = [name + piece for name in names for piece in part]
    rng.shuffle(names)
    return [name.capitalize() for name in names]


def _fact() -> Iterator[Row]:
    facts, homes = world()
    for town, known in facts.items():
        for relation, answer in known.items():
            _, p, q = RELATIONS[relation]
            for template in FACT_TEMPLATES:
                question = template.format(r=relation, p=p.format(town), q=q.format(town))
                yield question, answer, [], question
    for person, town in homes.items():
        for template in HOME_TEMPLATES:
            question = template.format(person)
            yield question, town, [], question


def _odd_one_out(name: str = "odd_one_out", documents: int = 16000, size: int = 4) -> Iterator[Row]:
    rng = _rng(name)
    for _ in range(documents):
        many, few = rng.sample(list(CATEGORIES), 2)
        odd = rng.choice(CATEGORIES[few].split())
        words = [*rng.sample(CATEGORIES[many].split(), size - 1), odd]
        rng.shuffle(words)
        yield rng.choice(ODD_TEMPLATES).format(", ".join(words)), odd, words, " ".join(sorted(words))


def _odd_of_six() -> Iterator[Row]:
    return _odd_one_out("odd_of_six", 4000, 6)


def _plural() -> Iterator[Row]:
    rng = _rng("plural")
    starts = "b bl br c cl d dr f fl g gl gr h k l m n p pl pr qu r s sl sn st t tr v w z".split()
    ends = "sh ch x ss f y ry ly b ck d g l ll m n nd nk p r rt st t mp".split()
    for _ in range(12000):
        noun = rng.choice(["", rng.choice("ba de fi lo mu ra so ti".split())])
        noun += rng.choice(starts) + rng.choice("aeiou") + rng.choice(ends)
        if noun[-2:] in ("ay", "ey", "iy", "oy", "uy"):
            continue
        template = rng.choice(("What is the plural of {}?", "One {}, two what?"))
        yield template.format(noun), plural(noun), [], noun


def plural(noun: str) -> str:
    """Apply the English rule: box boxes, berry berries, leaf leaves, cat cats."""
    if noun.endswith(("s", "x", "sh", "ch")):
        return noun + "es"
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    return noun[:-1] + "ves" if noun.endswith("f") else noun + "s"


_GENERATORS = {
    "sentiment": _sentiment,
    "topic": _topic,
    "fact": _fact,
    "odd_one_out": _odd_one_out,
    "odd_of_six": _odd_of_six,
    "plural": _plural,
}
# Shares that leave some 300 held-out documents, or as many as a small task can spare.
_TEST_PERCENT = {
    "sentiment": 5, "topic": 6, "fact": 25, "plural": 4, "odd_one_out": 4, "odd_of_six": 10,
}  # fmt: skip
