"""One noun or verb a file."""
