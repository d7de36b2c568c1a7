"""The forms a line of examples can take, one module each, found by listing this folder.

A module has `KEYS` (those every such line has), `SHAPE` (how it looks, for messages) and `parse(record, origin)`, which
returns the examples of the line and raises ValueError with what is wrong. An outside package adds a form through the
entry-point group `steer.example_formats`.
"""
