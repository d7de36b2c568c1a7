"""What can be merged: model folders, task vectors, adapters; and where the base of a task vector lies."""
