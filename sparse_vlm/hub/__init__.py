"""Where weights come from: the zoo and its sources, verified files, and models of transformers."""
