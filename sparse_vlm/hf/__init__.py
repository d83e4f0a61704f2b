"""The tower as a model, a configuration and an image processor of transformers."""
