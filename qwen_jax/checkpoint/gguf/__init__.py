"""GGUF, llama.cpp's format: export, and models that are read from it."""
