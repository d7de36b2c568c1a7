"""The tables of the log. `migrations` creates them; what is read and written goes through these definitions."""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Double, Integer, MetaData, Table, Text

METADATA = MetaData()

# Every version of an experiment that was served. `content` is `Experiment.frozen()` as canonical JSON.
EXPERIMENTS = Table(
    "experiments",
    METADATA,
    Column("experiment", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("content", Text, nullable=False),
    Column("at", Double, nullable=False),  # seconds since 1970, as in all tables
)

# One row for each answer, also for those that failed.
EXPOSURES = Table(
    "exposures",
    METADATA,
    Column("id", Text, primary_key=True),  # made by the server; a row that arrives twice is written once
    Column("experiment", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("arm", Text, nullable=False),
    # assigned; outside (no part of the experiment); forced (by header); stopped (after a stop); continued (a
    # conversation that keeps the arm which it had before the version, the stage or the stop)
    Column("reason", Text, nullable=False),
    Column("stage", Integer, nullable=False),  # index into `Experiment.steps`
    Column("counted", Boolean, nullable=False),  # whether the analysis uses it: assigned, and not during the ramp
    Column("at", Double, nullable=False),  # when the request arrived
    Column("unit", Text, nullable=False),  # a salted hash
    Column("unit_source", Text, nullable=False),  # user, header, conversation, or first message
    Column("conversation", Text, nullable=False),  # a salted hash
    Column("response", Text),  # the answer's id, which feedback names; NULL where there is no answer
    Column("digest", Text, nullable=False),  # `Arm.digest`
    Column("composition", Text),  # the digest in the engine's receipt; NULL where nothing was steered
    Column("status", Integer, nullable=False),  # of HTTP, or by `outcomes`
    Column("answers", Integer),  # of one request (`n`)
    Column("prompt_tokens", Integer),
    Column("cached_tokens", Integer),
    Column("response_tokens", Integer),
    Column("ttft", Double),  # seconds to the first token, where the answer was streamed
    Column("inter_token", Double),  # mean seconds between tokens, where the answer was streamed
    Column("latency", Double),  # seconds to the end of the answer
    Column("stop", Text),  # why it ended: stop, length, ...
    Column("weight_version", Text),
    Column("gates", Text),  # JSON, where the receipt has gates
    Column("characters", Integer),
    Column("repetition", Double),  # share of the 4-grams of words that occurred before
    Column("refusal", Boolean),
    Column("trace", Text),  # the trace id of W3C's traceparent
    Column("prompt", Text),  # JSON, only if the experiment stores texts
    Column("answer", Text),
    Column("epoch", Integer),  # in which the unit got its arm, where the weights are adaptive
)

FEEDBACK = Table(
    "feedback",
    METADATA,
    Column("id", Text, primary_key=True),  # derived from the client's key, where it sends one
    Column("experiment", Text, nullable=False),
    Column("version", Integer),  # of the answer, where it was known on arrival
    Column("response", Text),  # the answer's id, or
    Column("conversation", Text),  # the conversation's salted hash
    Column("metric", Text, nullable=False),
    Column("value", Double),  # true is 1; NULL for a comment or a demonstration
    Column("comment", Text),
    Column("demonstration", Text),  # a better answer
    Column("prompt", Text),  # JSON of the messages that the demonstration answers, where the client sends them
    Column("source", Text, nullable=False),  # user, or judge
    Column("mark", Text, nullable=False),  # empty; unknown (no such answer on arrival); late (after the experiment)
    Column("at", Double, nullable=False),
)

# What happened to an experiment: started, stage, stopped, warned, dropped, promoted, validated (its judges), unscored
# (answers, by a judge); forgotten (see `forgetting`).
EVENTS = Table(
    "events",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("experiment", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("kind", Text, nullable=False),
    Column("stage", Integer),
    Column("count", Integer),  # of rows that were dropped, or answers without a score
    Column("reason", Text, nullable=False),
    Column("at", Double, nullable=False),
)

# The epochs of an adaptive experiment but the first, 0, which has the weights of the file. `weights` are JSON, by arm.
EPOCHS = Table(
    "epochs",
    METADATA,
    Column("experiment", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("epoch", Integer, primary_key=True),
    Column("weights", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("selected", Text, nullable=False),  # the best arm, from the epoch on in which it is known; empty before
    Column("at", Double, nullable=False),
)

# What the answers add up to, so that a report need not read them: `sums` keeps these tables in the transaction that
# writes the answers. Of a unit whose answers count: its first arm, how many arms (2 stands for several), when its first
# answer was asked for, for each metric the sum over its answers with status 200, and how many of them have it; and the
# epoch in which it got its arm.
SUMMED = ("response_tokens", "ttft", "inter_token", "latency", "repetition", "refusal", "characters")
UNITS = Table(
    "units",
    METADATA,
    Column("experiment", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("unit", Text, primary_key=True),
    Column("arm", Text, nullable=False),
    Column("arms", Integer, nullable=False),
    Column("first", Double, nullable=False),
    *(Column(f"{kind}_{name}", Double, nullable=False) for name in SUMMED for kind in ("y", "x")),
    Column("epoch", Integer),
)

# Sums over the units of one arm that entered in one slot of time (`unit_sums.slot_of`), for each metric that they have.
# The metric "" counts the units themselves, with the arm "" those that were seen in several arms.
UNIT_SUMS = Table(
    "unit_sums",
    METADATA,
    Column("experiment", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("metric", Text, primary_key=True),
    Column("arm", Text, primary_key=True),
    Column("slot", Integer, primary_key=True),
    Column("units", Integer, nullable=False),
    Column("mean", Double, nullable=False),  # of a unit: y / x; the sum of these, and of their squares
    Column("mean_squared", Double, nullable=False),
    Column("y", Double, nullable=False),
    Column("yy", Double, nullable=False),
    Column("x", Double, nullable=False),
    Column("xx", Double, nullable=False),
    Column("xy", Double, nullable=False),
)

# Where the slots of time of a version begin.
SLOT_ORIGINS = Table(
    "slot_origins",
    METADATA,
    Column("experiment", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("at", Double, nullable=False),
)

# What all answers of one arm and reason add up to. `tokens` and `repetition` are of answers with a status below 400.
TALLIES = Table(
    "tallies",
    METADATA,
    Column("experiment", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("arm", Text, primary_key=True),
    Column("reason", Text, primary_key=True),
    Column("counted", Boolean, primary_key=True),
    Column("first", Double, nullable=False),  # when the first and the last of them were asked for
    Column("last", Double, nullable=False),
    Column("answers", Integer, nullable=False),
    Column("failed", Integer, nullable=False),  # by `outcomes`, as the next and `refused`
    Column("gone", Integer, nullable=False),
    Column("refusals", Integer, nullable=False),
    *(
        Column(f"{name}_{part}", Integer if part == "count" else Double, nullable=False)
        for name in ("tokens", "repetition")
        for part in ("count", "sum", "squares")
    ),
    Column("refused", Integer, nullable=False, server_default="0"),
)

# The newest value of each response or conversation that feedback is about (`about` is "response:" or "conversation:"
# with its id), and the unit for which it counts; `ratings` keeps these tables, as `sums` keeps those above.
RATINGS = Table(
    "ratings",
    METADATA,
    Column("experiment", Text, primary_key=True),
    Column("about", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("metric", Text, primary_key=True),
    Column("unit", Text, nullable=False),
    Column("value", Double, nullable=False),
)

# What the ratings of a unit add up to: their sum, and how many there are.
UNIT_RATINGS = Table(
    "unit_ratings",
    METADATA,
    Column("experiment", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("unit", Text, primary_key=True),
    Column("metric", Text, primary_key=True),
    Column("y", Double, nullable=False),
    Column("x", Double, nullable=False),
)

# How many pieces of feedback there are, comments and demonstrations too.
FEEDBACK_COUNTS = Table(
    "feedback_counts",
    METADATA,
    Column("experiment", Text, primary_key=True),
    Column("metric", Text, primary_key=True),
    Column("mark", Text, primary_key=True),
    Column("pieces", Integer, nullable=False),
)

ALL = {table.name: table for table in (EXPERIMENTS, EXPOSURES, FEEDBACK, EVENTS)}
