"""Text to token ids and back: tokenizer.py, chat templates, prompts, and text as it is generated.

frontend.py is what the rest of the package uses.
"""
