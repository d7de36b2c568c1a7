"""A/B experiments on live traffic: what is compared, who gets which arm, what was served, and what came back.

    specification   what an experiment is, frozen by digest     document     its file, checked;  template  a new one
    assignment      which arm a unit gets                       arms         what the arms name: vectors and adapters
    storage/        the log, in SQLite or PostgreSQL            statistics/  what can be concluded at every moment

The front end of a server (`steer.serving.http`) assigns and records; `steer ab` reads and decides.
"""
