"""Number of tokens in a page of the key-value cache. Needs no JAX, so schedulers can import it."""

PAGE = 64  # tokens
