"""Training: one loop for every family and tuner; a generator of events."""
