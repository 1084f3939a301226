"""Checkpoints restored onto any mesh: shardings as requested, values equal to the bit, each process its own shards.

Devices are simulated; their number is fixed when JAX starts, so each test has processes of its own.
"""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from hf_folders import hf_model

from qwen_jax.checkpoint import convert
from qwen_jax.parallel.placement import Placement, place
from qwen_jax.quantization import E4M3, QuantizedTensor

COMMON = """
import sys
import jax, numpy as np
from functools import partial
from pathlib import Path
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from qwen_jax.checkpoint import load_params, resolve
from qwen_jax.model.abstract import abstract
from qwen_jax.parallel.layout import best_layout, contract, expand, expanded_shape
from qwen_jax.parallel.mesh import spec_of
from qwen_jax.quantization import QuantizedTensor, default_precision

folders = [resolve(folder) for folder in sys.argv[1:4]]  # Hugging Face, converted, converted to FP8
config = folders[0].config
specs = abstract(config)
eight_bit = default_precision(config, True, None, tables=True)


def plan(layout, mesh_of):
    # Shardings of the expanded parameters, and what expands them.
    shardings, changed = {}, {}
    for path, spec in specs.items():
        shape, mesh = expanded_shape(spec.shape, spec.axes, layout), mesh_of(path)
        shardings[path] = NamedSharding(mesh, spec_of(spec.axes, shape, mesh))
        if shape != spec.shape:
            changed[path] = partial(expand, axes=spec.axes, layout=layout)
    return shardings, changed


def mesh(devices):
    return Mesh(np.array(devices), ("tensor",), axis_types=(AxisType.Auto,))


def same(one, other):
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def arrays(value):
    return [value.values, value.scale] if isinstance(value, QuantizedTensor) else [value]


def check_shardings(params, shardings):
    for path, value in params.items():
        values, *scale = arrays(value)
        assert values.sharding == shardings[path], path
        for one in scale:
            spec = PartitionSpec(*shardings[path].spec[:one.ndim])
            assert one.sharding == NamedSharding(shardings[path].mesh, spec), path
"""

ONE_PROCESS = COMMON + """
from qwen_jax.parallel.mesh import make_mesh
from qwen_jax.training import checkpoints

devices, changes = jax.devices(), {}
two = mesh(devices[:2]), mesh(devices[5:7])
cases = {"tensor 2": (2, None), "tensor 3": (3, None), "tensor 4": (4, None),
         "2 stages": (2, lambda path: two[not path.startswith(("embed", "layers.0"))])}
for source in folders:
    for precision in (None, eight_bit):
        plain = load_params(source, config, "bfloat16", precision=precision)
        assert any(isinstance(value, QuantizedTensor) for value in plain.values()) == (precision is not None)
        for name, (tensor, mesh_of) in cases.items():
            layout = best_layout(config, tensor, 1)
            whole = mesh(devices[1:1 + tensor])
            shardings, changed = plan(layout, mesh_of or (lambda path: whole))
            params = load_params(source, config, "bfloat16", shardings, precision, changed)
            check_shardings(params, shardings)
            for path, value in params.items():
                value = contract(jax.tree.map(np.asarray, value), specs[path].axes, layout)
                assert all(map(same, arrays(value), arrays(plain[path]))), (source, precision, name, path)
            changes[name] = len(changed)
assert changes["tensor 2"] == changes["2 stages"] == 0 < changes["tensor 4"] < changes["tensor 3"], changes

def on(data, tensor, params):
    one = make_mesh(data, tensor)
    return {path: jax.device_put(value, NamedSharding(one, spec_of(specs[path].axes, value.shape, one)))
            for path, value in params.items()}


# A training state saved from one mesh and restored on others.
plain = load_params(folders[0], config)
for before, after in (((4, 2), (2, 4)), ((4, 2), (1, 8)), ((1, 1), (4, 2))):
    folder = Path(sys.argv[4]) / f"{before}{after}"
    checkpoints.save(folder, 1, on(*before, plain), {}, 1)
    like = on(*after, {path: np.zeros_like(value) for path, value in plain.items()})
    _, restored = checkpoints.restore(folder, like, {})
    for path, value in restored.items():
        assert value.sharding == like[path].sharding and same(value, plain[path]), path
print("restored")
"""

TWO_PROCESSES = COMMON + """
from qwen_jax.checkpoint import orbax_store
orbax_store.groups.__defaults__ = (1,)  # many groups: the processes read different numbers of them
jax.distributed.initialize(sys.argv[4], 2, int(sys.argv[5]))
devices = jax.devices()
assert len(devices) == 8 and len(jax.local_devices()) == 4
halves = mesh(devices[:4]), mesh(devices[4:])
hf, orbax, fp8 = folders
for source, precision in ((hf, eight_bit), (orbax, None), (fp8, eight_bit), (fp8, None)):
    plain = load_params(source, config, "bfloat16", precision=precision)
    for tensor, mesh_of in ((8, None), (4, lambda path: halves[not path.startswith(("embed", "layers.0"))])):
        layout = best_layout(config, tensor, 1)
        shardings, changed = plan(layout, mesh_of or (lambda path: mesh(devices)))
        assert changed
        params = load_params(source, config, "bfloat16", shardings, precision, changed)
        check_shardings(params, shardings)
        for path, value in params.items():
            expected = expand(jax.tree.map(np.array, plain[path]), specs[path].axes, layout)
            here = len(set(shardings[path].device_set) & set(jax.local_devices()))
            assert here == 4 or here == 0 < tensor < 8, path
            for one, of_all in zip(arrays(value), arrays(expected), strict=True):
                assert one.shape == of_all.shape and one.dtype == of_all.dtype, path
                assert len(one.addressable_shards) == here, path
                for shard in one.addressable_shards:
                    assert same(shard.data, of_all[shard.index]), (source, precision, tensor, path)
print("restored")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("restore")
    hf_model(tied=False, layers=3).save_pretrained(root / "hf")
    convert(root / "hf", root / "orbax")
    convert(root / "hf", root / "fp8", fp8=True)
    return [root / name for name in ("hf", "orbax", "fp8")]


def run(code, devices, *arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu",
                   "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def outcome(child):
    out, err = child.communicate(timeout=240)
    assert child.returncode == 0 and out.endswith("restored\n"), err[-3000:]


def test_every_mesh_holds_the_same_parameters(folders, tmp_path):
    outcome(run(ONE_PROCESS, 8, *folders, tmp_path))


def test_processes_hold_their_own_parts(folders):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    children = [run(TWO_PROCESSES, 4, *folders, address, index) for index in range(2)]
    try:
        for child in children:
            outcome(child)
    finally:
        for child in children:
            child.kill()


def doubled(axis):
    """Return a function that repeats every index of an axis, of FP8 with its scale."""
    def expand(value):
        return jax.tree.map(lambda leaf: np.repeat(leaf, 2, axis) if axis < leaf.ndim else leaf, value)

    return expand


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_expanding_in_slabs_is_expanding_at_once(monkeypatch, axis, eight_bit):
    monkeypatch.setattr("qwen_jax.parallel.placement._SLAB_BYTES", 100)
    value = np.arange(6 * 5 * 7, dtype=np.float32).reshape(6, 5, 7)
    if eight_bit:
        value = QuantizedTensor(value.astype(E4M3), value[:, :, 0])
    calls = []

    def expand(part):
        calls.append(part.shape)
        return doubled(axis)(part)

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = place(value, Placement(sharding, inputs=1 if eight_bit else None, expand=expand))
    assert len(calls) > 3
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(doubled(axis)(value)), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def test_an_expansion_along_every_axis_is_made_whole():
    value = np.arange(6.0).reshape(2, 3)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = place(value, Placement(sharding, np.dtype(np.float32), expand=lambda part: np.pad(part, 1)))
    np.testing.assert_array_equal(found, np.pad(value, 1))
