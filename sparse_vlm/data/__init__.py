"""What a VLM learns to say: conversations out of captions, questions and labels, as token trees with checked label masks."""
