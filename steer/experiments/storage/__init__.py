"""The log of experiments: the same tables in SQLite (by default) and PostgreSQL (several servers).

tables      the tables, and what a column holds       migrations   how a log of an earlier release becomes this one
database    opening, reading and writing              state        versions of an experiment, stages, stops
epochs      the weights of an adaptive experiment
sums        what answers add up to, kept as they are written; figures reads it
journal     rows on their way to the database         writer       the thread that takes them there
forgetting  which rows must not arrive any more
"""
