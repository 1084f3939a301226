import pytest
from live import Live

SIZES = ("--max-seq-len", "256", "--max-batch-size", "8", "--max-requests", "16", "--dtype", "float32")


@pytest.fixture(scope="session")
def server(executable_cache):
    live = Live(*SIZES, "--max-adapters", "2")
    yield live
    live.output()
