"""The HTTP control plane: OpenAI's fine-tuning API over the services in core. Never loads torch."""
