"""Near-identity distractors from photos: the same background, another individual of the kind."""
