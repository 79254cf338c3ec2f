"""What changes: tuners attach to a backbone and detach from it bit for bit."""
