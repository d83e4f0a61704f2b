"""Ways out: a tower or a VLM as a folder that others can load, compared with the model before it is kept. `run.export` is the way in."""
