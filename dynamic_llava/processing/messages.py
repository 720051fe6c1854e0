"""Chat messages, as transformers' users write them, read into turns and images.

    [{"role": "user", "content": [{"type": "image", "path": "cat.jpg"}, {"type": "text", "text": "What is it?"}]}]

A message's parts stand on lines of their own: an image in front of a question gives LLaVA's "<image>\\nWhat is it?".
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dynamic_llava.files import brief
from dynamic_llava.processing.image_processor import ImageInput
from dynamic_llava.processing.prompts import IMAGE_PLACE, PromptFormat, Turn, conversation_prompt

Message = Mapping[str, Any]
"""`role` ("system", "user" or "assistant") and `content`: a text, or a list of parts of type "text" or "image"."""
IMAGE_SOURCES = ("image", "path", "url")
"""Keys under which a part of type "image" may hold its image."""


class ChatTurns(NamedTuple):
    """One conversation."""

    system: str | None
    """System text; None is the checkpoint's own."""
    turns: list[Turn]
    """(question, answer) pairs with `<image>` places; only the last answer may be None."""
    images: list[ImageInput | None]
    """The images in their order; None for a part that names none and only marks the place."""


def read_chats(conversation: Any) -> tuple[bool, list[ChatTurns]]:
    """Return whether a list of conversations was given, rather than the messages of one, and the conversations.

    Raises ValueError as `read_chat`, which names the conversation of a list.
    """
    if not isinstance(conversation, list | tuple) or not conversation or not isinstance(conversation[0], list | tuple):
        return False, [read_chat(conversation)]
    chats = []
    for row, messages in enumerate(conversation):
        try:
            chats.append(read_chat(messages))
        except ValueError as error:
            raise ValueError(f"conversation {row}: {error}") from None
    return True, chats


def named_images(chat: ChatTurns, row: int) -> list[ImageInput]:
    """Return a conversation's images; ValueError where a part marks a place and names none."""
    missing = sum(image is None for image in chat.images)
    if missing:
        raise ValueError(
            f"{missing} images of conversation {row} are named nowhere; write {{'type': 'image', 'image': picture}}, "
            "or make the text with tokenize=False and give it to the processor with images=..."
        )
    return [image for image in chat.images if image is not None]


def read_chat(messages: Sequence[Message]) -> ChatTurns:
    """Read the messages of one conversation.

    Raises ValueError that names the message for unknown roles, kinds of content and orders of speakers, and for images
    outside of questions.
    """
    if not isinstance(messages, list | tuple):
        raise ValueError(f"a conversation is a list of messages; a {type(messages).__name__} was given")
    if not messages:
        raise ValueError("a conversation needs at least one message; an empty list was given")
    images: list[ImageInput | None] = []
    texts = [_text(message, number, images) for number, message in enumerate(messages)]
    roles = [message["role"] for message in messages]
    first = int(roles[0] == "system")
    for number, role in enumerate(roles[first:], first):
        expected = ("user", "assistant")[(number - first) % 2]
        if role != expected:
            raise ValueError(
                f"message {number} has role {brief(role)} where {expected!r} belongs; a conversation is an optional "
                "system message, then user and assistant by turns"
            )
    spoken = texts[first:]
    if not spoken:
        raise ValueError("the conversation holds a system message alone; add a user message")
    answers: list[str | None] = [*spoken[1::2]]
    answers += [None] * (len(spoken) % 2)
    return ChatTurns(texts[0] if first else None, list(zip(spoken[::2], answers, strict=True)), images)


def chat_prompt(
    chat: ChatTurns, form: PromptFormat, *, add_generation_prompt: bool = False, continue_final_message: bool = False
) -> str:
    """Return the text of a conversation (`prompts.conversation_prompt`).

    add_generation_prompt: ask for the answer to the last question (vicuna_v1: end in `ASSISTANT:`).
    continue_final_message: leave the last answer open, so that a model goes on with it.
    Raises ValueError where the last message does not fit to what is asked for, or both are.
    """
    if add_generation_prompt and continue_final_message:
        raise ValueError("add_generation_prompt and continue_final_message exclude each other; set one of them")
    is_answered = chat.turns[-1][1] is not None
    if add_generation_prompt and is_answered:
        raise ValueError(
            "add_generation_prompt=True asks for an answer, but the last message is the assistant's; end in a user "
            "message, or set continue_final_message=True to let the model go on with it"
        )
    if continue_final_message and not is_answered:
        raise ValueError(
            "continue_final_message=True goes on with an answer, but the last message is the user's; end in an "
            "assistant message, or set add_generation_prompt=True"
        )
    text = conversation_prompt(chat.turns, chat.system, form)
    if continue_final_message:
        return text.removesuffix(form.end + form.closing)
    if is_answered or add_generation_prompt:
        return text
    return text.removesuffix(form.answer_opening) + form.question_closing


def _text(message: Message, number: int, images: list[ImageInput | None]) -> str:
    """Return the text of a message with its `<image>` places; append its images to `images`."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise ValueError(f"message {number} is {brief(message)}; a message is a dict with 'role' and 'content'")
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"message {number} has role {brief(role)}; choose 'system', 'user' or 'assistant'")
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ValueError(f"message {number} has content of type {type(content).__name__}; give a text or a list")
    return "\n".join(_part(part, role, number, images) for part in content)


def _part(part: Any, role: str, number: int, images: list[ImageInput | None]) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image_url":  # as OpenAI's interface has it
        found = part.get("image_url")
        part, kind = {"type": "image", "url": found.get("url") if isinstance(found, Mapping) else found}, "image"
    if kind != "image":
        raise ValueError(
            f"message {number} holds {brief(part)}; a part is {{'type': 'text', 'text': ...}} or {{'type': 'image', "
            "'image' or 'path': ...}"
        )
    if role != "user":
        raise ValueError(f"message {number} of role {role!r} holds an image; images belong into the user's messages")
    named = [key for key in part if key != "type"]
    if len(named) > 1 or not set(named) <= set(IMAGE_SOURCES):
        raise ValueError(
            f"message {number} gives an image by {brief(named)}; give one of {', '.join(map(repr, IMAGE_SOURCES))}, or "
            "none to mark the place alone"
        )
    image = part[named[0]] if named else None
    if named and not isinstance(image, ImageInput):
        raise ValueError(
            f"message {number} gives an image of type {type(image).__name__}; give a Pillow image, a path, bytes, or "
            "an array or tensor of 8 bits"
        )
    images.append(image)
    return IMAGE_PLACE
