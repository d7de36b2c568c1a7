"""What `steer doctor` finds: what is installed, where it runs, and what to do about each problem."""
