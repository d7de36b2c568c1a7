"""Files and folders that appear whole or not at all, their locks, and the record of a run."""
