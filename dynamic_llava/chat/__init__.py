"""Conversations that keep their cache, and the chat in a terminal: `python -m dynamic_llava.chat`."""
