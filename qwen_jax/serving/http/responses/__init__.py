"""OpenAI's Responses protocol: its bodies become those of chats, and answers are written and kept in its form."""
