"""Data of kinds of devices (memory, speed, links), from their makers' data sheets; assumptions are marked."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A kind of device and the links between several such devices.

    Attributes:
      name: the name that the command line knows.
      memory: bytes.
      bandwidth: bytes per second of that memory.
      bf16: dense peak of matrix products in bfloat16, operations per second.
      f32: the same in float32.
      fp8: the same in 8-bit floats; None if the device has no such products.
      link: bytes per second between neighbours, in one direction.
      collective_seconds: time of a collective beside moving its bytes. An assumption: NCCL's order of magnitude.
      overlaps: whether the device computes while it exchanges.
      xla_flags: XLA flags with which it does.
    """

    name: str
    memory: float
    bandwidth: float
    bf16: float
    f32: float
    fp8: float | None = None
    link: float
    collective_seconds: float
    overlaps: bool = True
    xla_flags: tuple[str, ...] = ()

    def peak(self, dtype: str, eight_bit: bool) -> float:
        """Return the operations per second of products in ``dtype``, or in 8 bits if the device has such products."""
        if eight_bit and self.fp8:
            return self.fp8
        return self.f32 if dtype == "float32" else self.bf16


# Share of the peaks that real programs reach: an assumption, the same for all devices, so that ratios hardly depend on
# it.
COMPUTE_SHARE, BANDWIDTH_SHARE, LINK_SHARE = 0.6, 0.8, 0.8

# Collectives start as soon as they can and end as late; and those of two halves of a prefill (see `model.partition`)
# are not combined again, as XLA does with independent ones up to this size.
_OVERLAPPING = ("--xla_gpu_enable_latency_hiding_scheduler=true",
                *(f"--xla_gpu_{kind}_combine_threshold_bytes={1 << 20}"
                  for kind in ("all_reduce", "all_gather", "reduce_scatter")))
# With registered buffers, NVLink switches reduce by themselves (NVLS), which leaves more of a device to products.
_WITH_SWITCHES = (*_OVERLAPPING, "--xla_gpu_enable_nccl_user_buffers=true")
_PCIE = {"link": 32e9, "collective_seconds": 25e-6, "xla_flags": _OVERLAPPING}
_AMPERE = {"bf16": 312e12, "f32": 19.5e12, "link": 300e9, "collective_seconds": 10e-6, "xla_flags": _OVERLAPPING}
_HOPPER = {"bf16": 989e12, "f32": 67e12, "fp8": 1979e12, "link": 450e9, "collective_seconds": 10e-6,
           "xla_flags": _WITH_SWITCHES}

_ALL = (
    # NVIDIA A10 data sheet: 24 GB, 600 GB/s, 125 TFLOPS BF16 without sparsity, 31.2 FP32; PCIe 4.0, 64 GB/s both ways.
    Hardware(name="a10", memory=24e9, bandwidth=600e9, bf16=125e12, f32=31.2e12, **_PCIE),
    # NVIDIA A100 data sheet: 1,555 and 2,039 GB/s, 312 TFLOPS BF16, 19.5 FP32; NVLink 600 GB/s both ways.
    Hardware(name="a100-40", memory=40e9, bandwidth=1555e9, **_AMPERE),
    Hardware(name="a100", memory=80e9, bandwidth=2039e9, **_AMPERE),
    # NVIDIA H100 (SXM) data sheet: 80 GB, 3.35 TB/s, 989 TFLOPS BF16 and 1,979 FP8 without sparsity, 67 FP32; NVLink
    # 900 GB/s both ways.
    Hardware(name="h100", memory=80e9, bandwidth=3350e9, **_HOPPER),
    # NVIDIA H200 data sheet: 141 GB, 4.8 TB/s, otherwise as H100.
    Hardware(name="h200", memory=141e9, bandwidth=4800e9, **_HOPPER),
    # Two cores with AVX-512, measured: 28 GB/s, 368 GFLOP/s in bfloat16, 190 in float32. Links are the memory itself.
    Hardware(name="cpu", memory=16e9, bandwidth=28e9, bf16=368e9, f32=190e9, link=14e9, collective_seconds=5e-6,
             overlaps=False),
)
HARDWARE = {kind.name: kind for kind in _ALL}


def hardware_of(device_kind: str) -> Hardware:
    """Return the hardware that JAX calls ``device_kind``. Raises UserError for an unknown kind."""
    kind = device_kind.lower()
    for name in ("h200", "h100", "a100-40", "a100", "a10", "cpu"):
        if all(part in kind for part in name.split("-")) and not (name == "a10" and "a100" in kind):
            return HARDWARE[name]
    raise UserError(f"the planner does not know {device_kind}: give tp_size as a number")


def hardware(name: str) -> Hardware:
    """Return the hardware called ``name``. Raises UserError for an unknown name."""
    if name not in HARDWARE:
        raise UserError(f"the device must be one of {', '.join(HARDWARE)}, not {name!r}")
    return HARDWARE[name]
