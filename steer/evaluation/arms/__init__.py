"""Arms: what an evaluation compares on the same items, the subjects and their controls."""
