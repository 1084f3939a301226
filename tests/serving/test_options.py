"""Options of a server: the command line and a cluster's file take the same ones, and give the same values."""

import argparse
import typing

import msgspec
import pytest

from qwen_jax.cli import main
from qwen_jax.cli_options import add_options, read_options
from qwen_jax.cluster.ray_serve.config import ClusterConfig, parse_config
from qwen_jax.errors import UserError
from qwen_jax.serving.options import CacheOptions, EngineOptions, ServerOptions
from qwen_jax.serving.server import assemble, engine_link

SECTIONS = {"engine": EngineOptions, "server": ServerOptions, "cache": CacheOptions}
FIELDS = [(section, field) for section, kind in SECTIONS.items() for field in msgspec.structs.fields(kind)]
VALUES = {bool: True, int: 7, float: 2.5, str: "text"}


def read(kind, *arguments):
    parser = argparse.ArgumentParser()
    add_options(parser, kind)
    return read_options(parser.parse_args(arguments), kind)


@pytest.mark.parametrize("section, field", FIELDS, ids=lambda value: getattr(value, "name", value))
def test_an_option_is_the_same_on_the_command_line_and_in_a_file(section, field):
    optional = typing.get_origin(field.type) is typing.Union
    kind, meta = typing.get_args(typing.get_args(field.type)[0] if optional else field.type)
    literal = typing.get_origin(kind) is typing.Literal
    value = typing.get_args(kind)[-1] if literal else VALUES[kind]
    argument = meta.extra["argument"] or "--" + field.name.replace("_", "-")
    options = read(SECTIONS[section], argument, *([] if kind is bool else [str(value)]))
    config = parse_config({"model": "bundled", section: {field.name: value}}, "the file")
    assert getattr(options, field.name) == getattr(getattr(config, section), field.name) == value != field.default


def test_defaults_differ_in_the_number_of_open_requests_alone():
    single, cluster = read(ServerOptions), ClusterConfig(model="bundled").server
    assert single == ServerOptions() and (single.max_requests, cluster.max_requests) == (1024, 4096)
    assert msgspec.structs.asdict(single) | {"max_requests": 4096} == msgspec.structs.asdict(cluster)


@pytest.mark.parametrize("arguments, said", [
    (("--port", "0"), "--port must be int >= 1, not 0"), (("--port", "70000"), "--port must be int <= 65535"),
    (("--max-requests", "0"), "--max-requests must be int >= 1"), (("--stall-seconds", "0"), "--stall-seconds must be"),
    (("--response-cache-mb", "-1"), "--response-cache-mb must be"), (("--tp-size", "0"), "--tp-size must be int >= 1")])
def test_a_value_out_of_range_is_refused_before_anything_starts(arguments, said, capsys):
    assert main(["serve", "bundled", *arguments]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("qwen-jax: ") and said in line


def test_options_get_to_the_engine_and_to_the_routes(tmp_path):
    engine = EngineOptions(batch_invariant=True, max_adapter_rank=4)
    options = ServerOptions(share_weights=True, log_format="json", log_prompts=True, name="shown", max_requests=3)
    link = engine_link("bundled", engine, options)
    launch = link._launch
    assert (launch.log_format, launch.share_weights, launch.model) == ("json", True, "bundled")
    assert launch.options == msgspec.structs.asdict(engine) | {"progress": False}
    applications = assemble(link, "bundled", options)
    assert applications.admin is None and applications.service.model == "shown"
    assert applications.service.options is options and link.open_answers.limit == 3
    with pytest.raises(UserError, match="an admin port needs keys"):
        assemble(link, "bundled", ServerOptions(admin_port=1))
    keys = tmp_path / "keys"
    keys.write_text("key\n")
    admin = assemble(link, "bundled", ServerOptions(admin_port=1, admin_keys=str(keys))).admin
    assert {route.path for route in admin.routes} >= {"/admin/weights", "/admin/weights/rollback"}
