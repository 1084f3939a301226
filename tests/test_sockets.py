"""Limits of sockets that a process sets for itself."""

import subprocess
import sys

CODE = """
import resource, socket
from qwen_jax.sockets import allow_many_connections
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
allow_many_connections()
print(len([socket.socket() for _ in range(100)]))
"""


def test_a_process_may_have_as_many_connections_as_the_system_allows():
    assert subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True).stdout == "100\n"
