"""Images: files and tars to PIL images (`decode`, `photos`), PIL images to the input of a model (`preprocess`)."""
