"""What a model is: the backbone, its families, and the noise law."""
