"""Drawing: a resident base, adapters swapped in and out, prompts in batches."""
