"""What goes on inside of a model: attention's entropy, recurrent states, and which components carry an effect."""
