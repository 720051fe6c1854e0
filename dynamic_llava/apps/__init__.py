"""What people use directly: conversations that keep their cache, and the chat in a terminal."""

from dynamic_llava.apps.conversation import Answer, CacheUse, Conversation, Step

__all__ = ["Answer", "CacheUse", "Conversation", "Step"]
