"""An OpenAI-compatible HTTP server for forged and Hugging Face models: ``agent_forge.serve.app.serve``."""
