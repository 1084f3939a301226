import pytest
from live import Live
from served import SIZES


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
