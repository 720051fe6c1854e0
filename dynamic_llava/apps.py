"""The former place of `dynamic_llava.Conversation` and its parts, for code that imports them from here."""

from dynamic_llava.chat.conversation import Answer, CacheUse, Conversation, Step

__all__ = ["Answer", "CacheUse", "Conversation", "Step"]
