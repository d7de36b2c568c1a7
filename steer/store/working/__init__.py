"""The working folder: `personality.yaml`, what it stands for, and checking out a commit."""
