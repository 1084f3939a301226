import pytest
from live import Live

SIZES = ("--max-seq-len", "256", "--max-batch-size", "8", "--max-requests", "16", "--dtype", "float32",
         "--max-adapters", "2")


@pytest.fixture(scope="session")
def server(executable_cache):
    live = Live(*SIZES)
    yield live
    live.output()
