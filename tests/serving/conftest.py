import pytest
from live import Live
from served import SIZES, model_with_tools


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    return str(model_with_tools(tmp_path_factory.mktemp("served") / "model"))


@pytest.fixture(scope="session")
def server(executable_cache, model):
    live = Live(*SIZES, model=model)
    yield live
    live.output()


@pytest.fixture
def own(executable_cache, model):
    """Makes servers of a test's own."""
    made = []

    def start(*arguments, **options) -> Live:
        made.append(Live(*SIZES, *arguments, model=model, **options))
        return made[-1]

    yield start
    for one in made:
        one.output()
