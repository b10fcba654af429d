"""The objects of OpenAI's API, one file a noun. A field of ours beside OpenAI's says so in its description."""
