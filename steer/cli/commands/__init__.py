"""The commands of `steer`, one per file."""
