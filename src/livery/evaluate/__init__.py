"""Does it work? One file per question, an interval on every answer, and a page a person can read."""
