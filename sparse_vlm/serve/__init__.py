"""`sparse-vlm serve`: an OpenAI-compatible server for one VLM, and a page to chat with it. Needs the extra `serve`."""
