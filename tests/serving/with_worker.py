"""``qwen-jax`` with another script in the place of the engine's process: ``python with_worker.py WORKER ARGUMENTS``."""

import sys
from functools import partial

from qwen_jax import cli
from qwen_jax.serving import server
from qwen_jax.serving.http import monitoring_routes

if __name__ == "__main__":
    worker, *arguments = sys.argv[1:]
    monitoring_routes.SNAPSHOT_SECONDS = 0.0  # tests compare the metrics before and after a request
    if worker:
        server.EngineClient = partial(server.EngineClient, command=(sys.executable, worker))
    sys.exit(cli.main(arguments))
