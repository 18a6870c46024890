"""The experiments that learn.py runs: a recipe of launch/configs, trained in legs, evaluated by length.

A leg is one run of launch/train.py with a curriculum and a batch of its own, which starts from the export of the leg
before.
"""

from typing import NamedTuple


class Leg(NamedTuple):
    """One run: its name, its curriculum (None: the recipe's), its batch, what else it sets, and if it is evaluated."""

    name: str
    curriculum: str | None = None
    batch: int = 256
    settings: tuple[str, ...] = ()
    evaluated: bool = True

    @property
    def overrides(self) -> tuple[str, ...]:
        """`settings` and the curriculum, as arguments of launch/train.py."""
        return (*([f"curriculum={self.curriculum}"] if self.curriculum else []), *self.settings)


class Experiment(NamedTuple):
    """A recipe, changed by `settings`, in legs; the lengths at which each leg is evaluated."""

    recipe: str
    legs: tuple[Leg, ...]
    lengths: tuple[int, ...]
    settings: tuple[str, ...] = ()
    samples: int = 512
    metric: str = "accuracy"
    evaluation: tuple[str, ...] = ()  # more arguments of launch/evaluate.py
    unit: str = "pairs"
    values: int | None = None  # of which there are so many different ones: the memory's capacity is estimated


REWRITE, REMEMBER = "retrieval_rewrite_cpu.yaml", "retrieval_remember_cpu.yaml"
PAIRS = (5, 10, 20, 50, 100, 200, 500)
SYMBOLS = 16
# The recipe fades its memory; what was measured before did not.
STEADY = "model.state_decay=null"
DECAY = "schedule: cosine, final: 0.1"
UNTIL = "until: {accuracy: 0.97, over: 50}"
START = f"{{pairs: 5, steps: 2500, warmup_steps: 100, {UNTIL}}}"
TO_10 = Leg("10", f"[{START}, {{pairs: 10, steps: 120}}]")
TO_40 = Leg(
    "40",
    "[{pairs: 20, at_least: 0.3, steps: 60, lr: 5.0e-4}, "
    f"{{pairs: 40, at_least: 0.3, steps: 120, lr: 5.0e-4, {DECAY}}}]",
    batch=96,
)
TO_120 = Leg("120", f"[{{pairs: 120, at_least: 0.3, steps: 100, lr: 5.0e-4, {DECAY}}}]", batch=24)

# Keys of two symbols. Among 16 of them a model finds one symbol of the key and stays there (.94 at up to 5 pairs: few
# share it); among 4 it finds both, and sooner.
TWO = (STEADY, "data.retrieval.key_length=2", "model.d_mem=32")
FEW = "{pairs: 5, symbols: 4, steps: 2500, warmup_steps: 100, until: {accuracy: 0.92, over: 30}}"
FEW_TO_10 = Leg("10", f"[{FEW}, {{pairs: 10, steps: 120, start: last}}]")
LONG_20 = Leg("20", f"[{{pairs: 20, at_least: 0.3, steps: 250, {DECAY}}}]", batch=128)
AGAIN_20 = Leg("20_again", f"[{{pairs: 20, at_least: 0.5, steps: 300, {DECAY}}}]", batch=128)
# More of such likeness: without the second stage one symbol still decided most errors (at 20 pairs .80, rewrite).
ALIKE_10 = Leg(
    "10",
    f"[{FEW}, {{pairs: 10, symbols: 4, at_least: 0.3, steps: 200, start: last}}, "
    "{pairs: 10, steps: 250, start: last}]",
)
# What a memory holds shows only where training asks for more than it holds.
TO_100 = Leg("100", f"[{{pairs: 100, at_least: 0.3, steps: 200, lr: 5.0e-4, {DECAY}}}]", batch=32)

# Without the denominator, in search of length. More training at 40 pairs helps where dropout keeps the loss above 0.
AGAIN_40 = Leg("40_again", f"[{{pairs: 40, at_least: 0.8, steps: 200, lr: 5.0e-4, {DECAY}}}]", batch=96)
ONCE_MORE_40 = AGAIN_40._replace(name="40_once_more")
NO_DENOMINATOR = {
    "": ((FEW_TO_10, TO_40, AGAIN_40), ()),
    "_2_memory_tokens": ((FEW_TO_10, TO_40, AGAIN_40), ("model.num_mem_tokens=2",)),
    "_d_mem_32": ((FEW_TO_10, TO_40), ("model.d_mem=32",)),
    "_dropout": (
        (FEW_TO_10, TO_40, AGAIN_40, ONCE_MORE_40),
        ("model.base_config.embd_pdrop=0.1", "model.base_config.resid_pdrop=0.1"),
    ),
}

# The mend of the drift: the memory fades, and once keys count, rows start from the memory of others. DECAY_RATE and
# CARRY by themselves, and each varied beside the other.
CARRY, DECAY_RATE = 0.9, 0.99
CARRIED = {
    "carried_decay": (CARRY, DECAY_RATE),
    **{f"carry_{p}_decay_{decay}": (p, decay) for p, decay in ((0, 1), *((p, DECAY_RATE) for p in (0, 0.5, 1)))},
    **{f"carry_{CARRY}_decay_{decay}": (CARRY, decay) for decay in (1, 0.999, 0.98)},
}
FAR = (10, 50, 100, 200, 500, 1000, 2000, 10000)


def carried(carry: float, decay: float) -> Experiment:
    """Return the experiment of a row of CARRIED."""
    legs = FEW_TO_10._replace(evaluated=False), TO_40._replace(settings=(f"train.carry_state={carry}",))
    lengths = FAR if (carry, decay) == (CARRY, DECAY_RATE) else FAR[:-1]
    settings = (f"model.state_decay={decay}",)
    return Experiment(REWRITE, legs, lengths, settings, samples=256, evaluation=("--batch", "256"))


# What the mend costs where the oldest facts count: the same legs, the last ones with carried states.
WITH_CARRY = (f"train.carry_state={CARRY}",)
WITH_DECAY = (f"model.state_decay={DECAY_RATE}",)


def with_carry(leg: Leg) -> Leg:
    """Return the leg with carried states."""
    return leg._replace(settings=(*leg.settings, *WITH_CARRY))


def unseen(legs: tuple[Leg, ...]) -> tuple[Leg, ...]:
    """Return the legs, of which only the last is evaluated."""
    return (*(leg._replace(evaluated=False) for leg in legs[:-1]), legs[-1])


# RMT on the same samples: a rate and an initialisation of its own, chosen by trials of 300 steps (ARMT has clicked by
# then), then as many steps as ARMT's leg 10 needed (773, seed 0), and four times as many.
RMT = (
    STEADY,
    "model.memory_kind=rmt",
    "model.base_config.n_positions=32",
    "data.retrieval.key_length=2",
)
TRIALS = {
    "lr_3.0e-4": ("3.0e-4", ()),
    "lr_1.0e-3": ("1.0e-3", ()),
    "lr_3.0e-3": ("3.0e-3", ()),
    "default_init": ("1.0e-3", ("model.init=null",)),
}
BEST_RATE = "1.0e-3"


def rmt_leg(name: str, few: int, alike: int, free: int, warmup: int) -> Leg:
    """The stages of ALIKE_10 with so many steps each."""
    stages = (
        f"{{pairs: 5, symbols: 4, steps: {few}, warmup_steps: {warmup}, lr: {BEST_RATE}}}",
        *(
            f"{{pairs: 10, {stage}, steps: {steps}, lr: {BEST_RATE}, start: last}}"
            for stage, steps in (("symbols: 4, at_least: 0.3", alike), ("symbols: 16", free))
        ),
    )
    return Leg(name, f"[{', '.join(stages)}]")


AS_MANY, FOUR_TIMES = rmt_leg("as_many", 323, 200, 250, 100), rmt_leg("four_times", 1319, 500, 500, 20)
SHORT = (1, 2, 3, 5, 10, 20, 50)

# A model from scratch says the place named last (.55) for longer than we waited, in free text and with a fact in every
# segment of 16 alike. With segments of 8, hardly longer than their facts, it finds the person in 250 steps.
CLOSE = Leg(
    "close",
    "[{segments: 5, at_least: 0.8, steps: 1000, warmup_steps: 100, until: {accuracy: 0.97, over: 30}}]",
)
# A fact may lie across the border of two segments.
LONGER = ("model.segment_tokens=16", "model.sliding_window=8")
ALIGNED = Leg(
    "aligned",
    "[{segments: 6, at_least: 0.5, steps: 600, warmup_steps: 20, until: {accuracy: 0.97, over: 30}}]",
    128,
    LONGER,
)
FREE = Leg(
    "8",
    f"[{{segments: 8, at_least: 0.4, steps: 400, {DECAY}}}]",
    128,
    (*LONGER, "data.babilong.aligned=false"),
)
# QA2 goes on from QA1, as in the paper; its stories have three facts at least.
STORIES = {
    "qa1": (CLOSE, ALIGNED, FREE),
    "qa2": (
        CLOSE._replace(name="close_qa1", settings=("data.babilong.tasks=[qa1]",)),
        CLOSE._replace(curriculum=CLOSE.curriculum.replace("segments: 5, at_least: 0.8", "segments: 7, at_least: 0.7")),
        ALIGNED._replace(
            curriculum=ALIGNED.curriculum.replace("segments: 6, at_least: 0.5", "segments: 7, at_least: 0.7")
        ),
        FREE,
    ),
}

# Long text: segments of 16 bytes. What RMT and no memory lack in parameters they have in wider layers.
PLAYS = "benchmarks/data/plays"
TEXT = (
    f"data.text.files={PLAYS}",
    f"data.text.validation_files=[{PLAYS}/macbeth.txt,{PLAYS}/othello.txt,{PLAYS}/winters_tale.txt]",
    "ds_config.optimizer.params.weight_decay=0.01",
)
WIDER = "model.base_config.intermediate_size=523"
READ = f"steps: 400, warmup_steps: 40, lr: 2.0e-3, {DECAY}"
# Twice, the second time on other samples.
AGAIN = {"": (), "_again": ("data.seed=1",)}
EIGHT = tuple(Leg(f"8{n}", f"[{{segments: 8, at_least: 1.0, {READ}}}]", 32, other) for n, other in AGAIN.items())
# As many tokens a step, one segment each.
SINGLE = tuple(Leg(f"1{n}", f"[{{segments: 1, {READ}}}]", 256, other) for n, other in AGAIN.items())
MEMORIES = {
    "armt": (EIGHT, (), ()),
    "rmt": (EIGHT, ("model.memory_kind=rmt", WIDER), ()),
    "none": (SINGLE, ("model.memory_kind=rmt", WIDER), ("--zero-memory",)),
}

EXPERIMENTS = {
    "quickstart": Experiment("default.yaml", (Leg("10"),), (*PAIRS, 1000, 2000), samples=256),
    "rewrite": Experiment(REWRITE, (TO_10, TO_40, TO_120), PAIRS, (STEADY,)),
    **{
        f"rewrite_no_denominator{name}": Experiment(REWRITE, legs, PAIRS, (STEADY, "model.use_denom=false", *settings))
        for name, (legs, settings) in NO_DENOMINATOR.items()
    },
    **{f"rewrite_{name}": carried(*values) for name, values in CARRIED.items()},
    "rewrite_two_symbols": Experiment(REWRITE, (ALIKE_10, LONG_20, AGAIN_20), PAIRS[:-2], TWO),
    "remember_two_symbols": Experiment(REMEMBER, (ALIKE_10, LONG_20, AGAIN_20), PAIRS[:-2]),
    **{
        f"remember_d_mem_{d_mem}": Experiment(
            REMEMBER, (ALIKE_10, LONG_20, TO_100), PAIRS[:-1], (f"model.d_mem={d_mem}",), values=SYMBOLS
        )
        for d_mem in (16, 32, 64)
    },
    **{
        f"rmt_{name}": Experiment(
            REWRITE,
            (Leg("5", f"[{{pairs: 5, symbols: 4, steps: 300, warmup_steps: 100, lr: {lr}}}]"),),
            SHORT,
            (*RMT, *init),
        )
        for name, (lr, init) in TRIALS.items()
    },
    "remember_carried_decay": Experiment(
        REMEMBER,
        unseen((ALIKE_10, LONG_20, with_carry(TO_100))),
        PAIRS[:-1],
        ("model.d_mem=32", *WITH_DECAY),
        values=SYMBOLS,
    ),
    "rmt_two_symbols": Experiment(REWRITE, (AS_MANY, FOUR_TIMES), SHORT, RMT),
    **{
        f"babilong_{task}": Experiment(
            "babilong_cpu.yaml",
            legs,
            (8, 16, 32, 64, 128, 256, 512),
            (f"data.babilong.tasks=[{task}]",),
            samples=128,
            unit="segments",
        )
        for task, legs in STORIES.items()
    },
    **{
        f"babilong_{task}_{name}": Experiment(
            "babilong_cpu.yaml",
            unseen((*legs[:-1], with_carry(legs[-1]))),
            (8, 16, 32, 64, 128, 256, 512),
            (f"data.babilong.tasks=[{task}]", *settings),
            samples=128,
            unit="segments",
        )
        for task, legs in STORIES.items()
        for name, settings in (("carried", ()), ("carried_decay", WITH_DECAY))
    },
    "plays_armt_carried_decay": Experiment(
        "plays_short_segments_cpu.yaml",
        (with_carry(EIGHT[0]),),
        (1, 4, 16),
        (*TEXT, *WITH_DECAY),
        samples=1024,
        unit="segments",
        metric="bits_per_byte",
    ),
    **{
        f"plays_{name}": Experiment(
            "plays_short_segments_cpu.yaml",
            legs,
            (1, 4, 16),
            (*TEXT, *settings),
            samples=1024,
            unit="segments",
            metric="bits_per_byte",
            evaluation=evaluation,
        )
        for name, (legs, settings, evaluation) in MEMORIES.items()
    },
}
