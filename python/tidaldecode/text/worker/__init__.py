"""The process that reads a folder's tokenizer and chat template, and turns text into ids and back.

text_process.py starts it and server.py is its loop. It imports tokenizers and jinja2 only, neither
tidaldecode nor numpy, and is found as a package of its own: imports in here are relative.
"""
