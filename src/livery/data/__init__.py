"""From a folder of pictures to a Dataset: reading, looking after, bucketing, caching."""
