"""Anthropic's Messages protocol: its bodies become those of chats, and answers are written in its form."""
