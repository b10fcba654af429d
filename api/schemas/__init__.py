"""The wire's objects, exactly as OpenAI's client reads them; our own fields are extras."""
