"""What follows from commits: walking over them, differences, merges and reversals."""
