"""Where weights come from: the zoo, its sources, and files that are verified before they are read."""
