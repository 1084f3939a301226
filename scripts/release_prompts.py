"""A hundred prompts for checks of released models: chat, code, Chinese and emoji, of 1 to 3,000 tokens."""

from __future__ import annotations

import argparse
import ast
import csv
import json
import textwrap
import typing
from pathlib import Path
from typing import Any

QUESTIONS = (
    "What is the capital of France?", "Name three uses of a paper clip.", "Translate to German: the rain has stopped.",
    "What is 17 * 23? Show your steps.", "Write a haiku about a lighthouse.", "Summarise the plot of Hamlet briefly.",
    "Write a Python function that reverses a linked list.", "Explain what a mutex is.", "Fix this: def f(x) return x+1",
    "Give me a JSON object with a name and an age.", "Write a regular expression for an ISO date.",
    "What does `git rebase -i HEAD~3` do?", "Write SQL that finds duplicate e-mail addresses in table users.",
    "List the first ten prime numbers.", "Why is the sky blue?", "Write a C function that swaps two integers.",
    "Convert 98.6 degrees Fahrenheit to Celsius.", "What is the difference between TCP and UDP?",
    "用一句话介绍一下你自己。", "写一首关于秋天的五言绝句。", "用Python写一个快速排序。", "中国有多少个省?",
    "把这句话翻译成英文:今天天气很好。",
    "解释一下什么是递归。",
    "1到100的和是多少?", "北京和上海哪个城市更大?",
    "写一个计算斐波那契数列的函数。",
    "列出三种常见的排序算法,并比较复杂度。", "请解释HTTP状态码404。",
    "给我讲一个笑话。",
    "What does 🚀 mean in a commit message?", "Reply with emoji only: I am happy 😀", "Count the emoji: 🍎🍎🍊🍌🍎",
    "🇫🇷 + 🗼 = ?", "Translate into words: 🐍➡️📦➡️☁️", "Is 👩‍👩‍👧‍👦 one character?", "Write a tweet about tea with ☕.",
    "用emoji描述春天🌸", "🤔 why is 0.1 + 0.2 != 0.3?", "Rank these: 🥉🥇🥈",
)
BEGINNINGS = (
    "The", "def", "1", "\n", "你", "🙂", "import numpy as np\n", "1, 1, 2, 3, 5, 8,", "The capital of France is",
    "def fibonacci(n):\n", "SELECT name FROM users WHERE", "<html>\n<body>\n", "#include <stdio.h>\n\nint main(",
    "从前有一座山,山里有一座庙,", "春眠不觉晓,", "机器学习是",
    "😀😃😄😁😆😅", "🐶🐱🐭🐹🐰🦊🐻🐼", "Привет, мир,", "مرحبا بالعالم",
)
SOURCES = (argparse, ast, csv, json, textwrap, typing)
LENGTHS = tuple(round(8 * (3000 / 8) ** (step / 39)) for step in range(40))  # tokens, evenly spaced by ratio


def release_prompts(tokenizer: Any) -> list[list[int]]:
    """Return the prompts as token ids: questions in the chat format, beginnings of texts, and passages of code.

    The passages are from Python's standard library and begin at any place of a file.
    """
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    chats = QUESTIONS if not tokenizer.chat_template else [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                      tokenize=False) for question in QUESTIONS]
    files = [encode(Path(module.__file__).read_text()) for module in SOURCES]
    longest = max(files, key=len)
    passages = []
    for number, length in enumerate(LENGTHS):
        file = files[number % len(files)]
        file = file if len(file) > length else longest
        start = 37 * number % (len(file) - length)
        passages.append(file[start: start + length])
    return [encode(text) for text in (*chats, *BEGINNINGS)] + passages
