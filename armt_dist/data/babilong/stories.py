"""Worlds of bAbI (Weston et al., arXiv 1502.05698), tasks 1 to 5, with the wording of the published set.

    qa1  Where is Mary?                           the last move of a person
    qa2  Where is the milk?                       a thing is where its carrier is, or was when it was dropped
    qa3  Where was the milk before the garden?    the place before the thing's latest arrival there
    qa4  What is north of the garden?             two arguments; either place of one fact is asked for
    qa5  Who did Fred give the milk to?           three arguments of the latest fitting gift

A story is a list of sentences with a question on them.
"""

from collections.abc import Callable, Iterator
from itertools import product
from random import Random
from string import Formatter
from typing import NamedTuple

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
DIRECTIONS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
PEOPLE = ("Mary", "John", "Daniel", "Sandra")
GIVERS = ("Mary", "Fred", "Jeff", "Bill")
# Kind of fact -> sentence, and the choices of wording.
FACTS = {
    "move": "{person} {verb} the {place}.",
    "take": "{person} {verb} the {thing}{there}.",
    "drop": "{person} {verb} the {thing}{there}.",
    "give": "{person} {verb} the {thing} to {receiver}.",
    "lie": "The {place} is {direction} of the {other}.",
}
VERBS = {
    "move": ("moved to", "went to", "went back to", "journeyed to", "travelled to"),
    "take": ("got", "grabbed", "took", "picked up"),
    "drop": ("dropped", "discarded", "left", "put down"),
    "give": ("gave", "passed", "handed"),
    "lie": ("is",),
}
THERE = ("", " there")
WHERE_PERSON = "Where is {person}?"
WHERE_THING = "Where is the {thing}?"
BEFORE = "Where was the {thing} before the {place}?"
# Question -> the field of the fact that answers it; the fields that the question names choose the fact.
LIE_QUESTIONS = {"What is {direction} of the {other}?": "place", "What is the {place} {direction} of?": "other"}
GIVE_QUESTIONS = {
    "What did {person} give to {receiver}?": "thing",
    "Who gave the {thing} to {receiver}?": "person",
    "Who did {person} give the {thing} to?": "receiver",
    "Who gave the {thing}?": "person",
    "Who received the {thing}?": "receiver",
}


class StoryEvent(NamedTuple):
    """One event; the fields that its kind does not use are empty."""

    kind: str
    person: str = ""
    place: str = ""
    thing: str = ""
    receiver: str = ""
    direction: str = ""
    other: str = ""

    def tell(self, random: Random) -> str:
        """Return the event as a sentence in random wording."""
        words = self._asdict() | {"verb": random.choice(VERBS[self.kind]), "there": random.choice(THERE)}
        return FACTS[self.kind].format(**words)


class Story(NamedTuple):
    """Facts and a question on them; `supporting` are the indices of the facts behind the answer, ascending."""

    facts: list[str]
    question: str
    answer: str
    supporting: list[int]


class Answer(NamedTuple):
    """A question with its answer, and the indices of the facts that it follows from."""

    question: str
    answer: str
    supporting: tuple[int, ...]


class Puzzle(NamedTuple):
    """One task: the fewest and most facts of a story, the events of its world, and the questions about them."""

    fewest: int
    most: int
    happen: Callable[[Random, int], list[StoryEvent]]
    ask: Callable[[Random, list[StoryEvent]], Answer | None]


def tell(random: Random, task: str, count: int) -> Story:
    """Generate a story of `count` facts, within the limits of the task."""
    puzzle = PUZZLES[task]
    count = min(max(count, puzzle.fewest), puzzle.most)
    answer = None
    while answer is None:
        events = puzzle.happen(random, count)
        answer = puzzle.ask(random, events)
    return Story([event.tell(random) for event in events], answer.question, answer.answer, sorted(answer.supporting))


def act(people: tuple[str, ...], weights: dict[str, int]) -> Callable[[Random, int], list[StoryEvent]]:
    """Return a generator of events: `people` act at random, with a weight for each kind of act."""

    def happen(random: Random, count: int) -> list[StoryEvent]:
        at: dict[str, str] = {}
        carried: dict[str, str] = {}
        # Places of dropped things; an untouched thing may appear anywhere.
        lies: dict[str, str] = {}
        events: list[StoryEvent] = []
        while len(events) < count:
            person = random.choice(people)
            kind = random.choices(list(weights), list(weights.values()))[0]
            event = attempt(random, kind, person, (at, carried, lies))
            if event is not None:
                events.append(event)
        return events

    return happen


def attempt(random: Random, kind: str, person: str, world: tuple[dict, dict, dict]) -> StoryEvent | None:
    """Carry out one act and change the world in place; None if it is impossible."""
    at, carried, lies = world
    here = at.get(person)
    if kind == "move":
        at[person] = random.choice([place for place in PLACES if place != here])
        return StoryEvent("move", person, at[person])
    held = [thing for thing in THINGS if carried.get(thing) == person]
    free = [thing for thing in THINGS if here and thing not in carried and lies.get(thing, here) == here]
    near = [other for other, place in at.items() if place == here and other != person]
    things = free if kind == "take" else held
    if not things or (kind == "give" and not near):
        return None
    thing = random.choice(things)
    receiver = random.choice(near) if kind == "give" else ""
    if kind == "drop":
        del carried[thing]
        lies[thing] = here
    else:
        carried[thing] = receiver or person
    return StoryEvent(kind, person, thing=thing, receiver=receiver)


def settle(random: Random, count: int) -> list[StoryEvent]:
    """Place `count` + 1 places on a grid (qa4); each fact joins a new place to an earlier one."""
    first, *others = random.sample(PLACES, count + 1)
    cells = {(0, 0): first}
    events = []
    for place in others:
        options = [(cell, way) for cell in cells for way in DIRECTIONS if step(cell, way) not in cells]
        cell, way = random.choice(options)
        cells[step(cell, way)] = place
        forth = StoryEvent("lie", place=place, direction=way, other=cells[cell])
        back = StoryEvent("lie", place=cells[cell], direction=OPPOSITE[way], other=place)
        events.append(random.choice((forth, back)))
    random.shuffle(events)
    return events


def step(cell: tuple[int, int], way: str) -> tuple[int, int]:
    """Return the neighbouring cell in direction `way`."""
    return cell[0] + DIRECTIONS[way][0], cell[1] + DIRECTIONS[way][1]


OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


def ask_person(random: Random, events: list[StoryEvent]) -> Answer:
    """Ask where a person is."""
    last = {event.person: i for i, event in enumerate(events)}
    person = random.choice(list(last))
    return Answer(WHERE_PERSON.format(person=person), events[last[person]].place, (last[person],))


class Visit(NamedTuple):
    """A thing's arrival at a place, the facts that tell it, and those that tell where it was before."""

    place: str
    known_from: tuple[int, ...]
    came_from: tuple[int, ...]


def trace_thing(events: list[StoryEvent], thing: str) -> list[Visit]:
    """Return the known visits of a thing; the last one's `known_from` follows takes and drops there."""
    moved: dict[str, int] = {}
    visits: list[Visit] = []
    carrier, taken = None, -1
    for i, event in enumerate(events):
        if event.kind == "move":
            before, moved[event.person] = moved.get(event.person, -1), i
            if event.person == carrier:
                visits.append(Visit(event.place, (taken, i), (taken, before, i)))
        elif event.thing == thing:
            carrier, taken = (event.person, i) if event.kind == "take" else (None, -1)
            here = moved[event.person]
            if not visits:
                visits.append(Visit(events[here].place, (), ()))
            visits[-1] = visits[-1]._replace(known_from=(i, here))
    return visits


def ask_thing(random: Random, events: list[StoryEvent]) -> Answer | None:
    """Ask where a thing is; None if there is none."""
    things = sorted({event.thing for event in events if event.thing})
    if not things:
        return None
    thing = random.choice(things)
    visit = trace_thing(events, thing)[-1]
    return Answer(WHERE_THING.format(thing=thing), visit.place, visit.known_from)


def ask_before(random: Random, events: list[StoryEvent]) -> Answer | None:
    """Ask where a thing was before its latest arrival; None if that is unknown."""
    options = []
    for thing in sorted({event.thing for event in events if event.thing}):
        visits = trace_thing(events, thing)
        latest = {visit.place: i for i, visit in enumerate(visits)}
        options += [(thing, visits[i - 1], visits[i]) for i in latest.values() if i > 0]
    if not options:
        return None
    thing, before, visit = random.choice(options)
    return Answer(BEFORE.format(thing=thing, place=visit.place), before.place, visit.came_from)


def ask_about(kind: str, questions: dict[str, str]) -> Callable[[Random, list[StoryEvent]], Answer | None]:
    """Ask for one field of the latest event of `kind` that agrees with all the fields that the question names."""

    def ask(random: Random, events: list[StoryEvent]) -> Answer | None:
        told = [event for event in events if event.kind == kind]
        if not told:
            return None
        question, event = random.choice(list(questions)), random.choice(told)
        named = fields(question)
        latest = max(
            i for i, e in enumerate(events) if all(getattr(e, f) == getattr(event, f) for f in ["kind", *named])
        )
        event = events[latest]
        return Answer(question.format(**event._asdict()), getattr(event, questions[question]), (latest,))

    return ask


def fields(template: str) -> list[str]:
    """List the names of the placeholders of a template."""
    return [name for _, name, _, _ in Formatter().parse(template) if name]


PUZZLES = {
    "qa1": Puzzle(2, 1000, act(PEOPLE, {"move": 1}), ask_person),
    "qa2": Puzzle(3, 1000, act(PEOPLE, {"move": 5, "take": 3, "drop": 2}), ask_thing),
    "qa3": Puzzle(5, 1000, act(PEOPLE, {"move": 5, "take": 3, "drop": 1}), ask_before),
    "qa4": Puzzle(2, len(PLACES) - 1, settle, ask_about("lie", LIE_QUESTIONS)),
    "qa5": Puzzle(
        6, 1000, act(GIVERS, {"move": 3, "take": 3, "drop": 1, "give": 4}), ask_about("give", GIVE_QUESTIONS)
    ),
}


def sentences() -> Iterator[str]:
    """Yield every fact and question that a story can contain."""
    people = tuple(dict.fromkeys(PEOPLE + GIVERS))
    words = {"person": people, "receiver": people, "place": PLACES, "other": PLACES, "thing": THINGS, "there": THERE}
    words["direction"] = tuple(DIRECTIONS)
    templates = [(template, VERBS[kind]) for kind, template in FACTS.items()]
    templates += [(question, ()) for question in (WHERE_PERSON, WHERE_THING, BEFORE, *LIE_QUESTIONS, *GIVE_QUESTIONS)]
    for template, verbs in templates:
        names = fields(template)
        for choice in product(*(verbs if name == "verb" else words[name] for name in names)):
            yield template.format(**dict(zip(names, choice, strict=True)))
