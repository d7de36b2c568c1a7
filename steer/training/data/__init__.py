"""What a student learns from: files, samples, teachers and replay data."""
