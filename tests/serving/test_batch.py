"""Batches of requests: read, answered as a server answers them, taken up again; what cannot be is one line."""

import asyncio
import io
import json

import pytest
from fake_engine import FakeEngine

from qwen_jax.cli import main
from qwen_jax.errors import UserError
from qwen_jax.serving.batch import answered, model_of, read_batch, run_batch

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}


def lines(count=3, **body):
    return [{"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": {**CHAT, **body}}
            for number in range(count)]


def write(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


class Engine(FakeEngine):
    """A stand-in for an engine that starts and stops."""

    def __init__(self, **options):
        super().__init__(**options)
        self.ended, self.running = asyncio.Event(), None

    async def start(self):
        self.running = True

    async def stop(self):
        self.running = False
        return 0


def answers(path, engine, concurrency=4):
    output = io.StringIO()

    async def run():
        return await run_batch(engine, "m", read_batch(path), output, concurrency=concurrency, progress=False)

    return asyncio.run(run()), [json.loads(line) for line in output.getvalue().splitlines()]


def test_every_request_is_answered_as_over_http(tmp_path):
    values = [*lines(20), {"custom_id": "e", "url": "/v1/embeddings", "body": {"input": "a"}},
              {"custom_id": "bad", "url": "/v1/completions", "body": {"prompt": "a", "colour": 1}}]
    engine = Engine(max_requests=3)  # fewer than run at once: those refused are tried again
    errors, found = answers(write(tmp_path / "in", values), engine)
    by_name = {one["custom_id"]: one["response"] for one in found}
    assert by_name.keys() == {one["custom_id"] for one in values} and len(found) == len(values)
    assert errors == 1 and by_name["bad"]["status_code"] == 400
    assert "colour" in by_name["bad"]["body"]["error"]["message"]
    assert by_name["r7"]["body"]["choices"][0]["message"]["content"] == "text"
    assert by_name["e"]["body"]["object"] == "list" and engine.most == 3 and engine.running is False
    assert by_name["r7"]["request_id"].startswith("req_") and len({one["id"] for one in found}) == len(found)


def test_an_engine_that_stops_ends_the_batch(tmp_path):
    engine = Engine()
    generate = engine.generate

    def failing(*arguments):
        if len(engine.asked) == 2:
            engine.failure = "out of memory"
        return generate(*arguments)

    engine.generate = failing
    with pytest.raises(UserError, match="stopped: out of memory; run the command again"):
        answers(write(tmp_path / "in", lines(9)), engine, concurrency=1)
    assert engine.running is False
    engine = Engine()
    engine.refused = "no such model"
    with pytest.raises(UserError, match="no such model"):
        answers(tmp_path / "in", engine)


def test_a_last_line_that_was_cut_is_written_again(tmp_path):
    path = tmp_path / "out"
    assert answered(path) == set()
    whole = json.dumps({"custom_id": "r0"}) + "\n"
    path.write_text(whole + '{"custom_id": "r1", "resp')
    assert answered(path) == {"r0"} and path.read_text() == whole
    path.write_text("a,b\nc,d\n")
    with pytest.raises(UserError, match="no file of answers"):
        answered(path)
    assert path.read_text() == "a,b\nc,d\n"


@pytest.mark.parametrize("text, said", [
    ("", "has no requests"), ("{", "line 1: not JSON"), ('{"custom_id": "a"}', "line 1: must be an object"),
    ("[" * 100_000, "line 1: not JSON"),
    ('\n{"custom_id": "a", "url": "/v1/models", "body": {}}', "line 2: must POST to one of /v1/chat"),
    ('{"custom_id": "a", "url": "/v1/completions", "method": "GET", "body": {}}', "not GET /v1/completions"),
    ('{"custom_id": "a", "url": "/v1/completions", "body": {"stream": true}}', "leave out stream"),
    ('{"custom_id": "a", "url": "/score", "body": {}}\n' * 2, "line 2: custom_id 'a' stands in another line")])
def test_wrong_lines_are_named_before_anything_runs(tmp_path, text, said):
    (tmp_path / "in").write_text(text)
    with pytest.raises(UserError, match=said):
        read_batch(tmp_path / "in")


def test_a_batch_is_for_one_model(tmp_path):
    assert model_of(read_batch(write(tmp_path / "in", lines()))) is None
    assert model_of(read_batch(write(tmp_path / "in", lines(model="a")))) == "a"
    other = {**lines(model="b")[0], "custom_id": "other"}
    with pytest.raises(UserError, match="names a, b"):
        model_of(read_batch(write(tmp_path / "in", [*lines(model="a"), other])))


def test_the_command_goes_on_where_it_was(tmp_path, capsys, executable_cache):
    batch, output = write(tmp_path / "in", lines(model="bundled")), tmp_path / "out"
    command = ["run-batch", str(batch), str(output), "--max-batch-size", "2", "--max-seq-len", "64"]
    output.write_text('{"custom_id": "r1"}\n{"custom_')
    assert main(command) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(one["custom_id"] for one in found) == ["r0", "r1", "r2"]
    assert all(one["response"]["status_code"] == 200 for one in found[1:])
    assert "1 of 3 requests were answered before" in capsys.readouterr().err
    assert main(command) == 0 and len(output.read_text().splitlines()) == 3
    write(batch, lines(1, model="bundled"))
    assert main(command) == 2 and "is no request of" in capsys.readouterr().err
    assert main(["run-batch", str(write(tmp_path / "no", lines())), str(output)]) == 2
    assert "--model MODEL" in capsys.readouterr().err
