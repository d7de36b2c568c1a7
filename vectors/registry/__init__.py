"""Methods found by listing their folder, and how their options are declared and read."""
