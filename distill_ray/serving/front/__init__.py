"""The HTTP face: the OpenAI API, keys, limits, the status page."""
