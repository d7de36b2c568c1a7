"""The inputs of a merge: model folders, task vectors and adapters; and the location of a task vector's base."""
