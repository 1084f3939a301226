"""Devices as data, from their makers' data sheets; what is an assumption says so."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_jax.errors import UserError


@dataclass(frozen=True)
class Hardware:
    """One kind of device and the links between several of them.

    Attributes:
      memory: bytes.
      bandwidth: of that memory, bytes per second.
      bf16, fp8, f32: dense peak of matrix products, operations per second; fp8 None where there is none.
      link: bytes per second between neighbours, in one direction.
      collective_seconds: that a collective takes beside moving its bytes. An assumption: NCCL's order of magnitude.
      overlaps: whether it computes while it exchanges; xla_flags: with which XLA lets it.
    """

    name: str
    memory: float
    bandwidth: float
    bf16: float
    f32: float
    fp8: float | None
    link: float
    collective_seconds: float
    overlaps: bool = True
    xla_flags: tuple[str, ...] = ()

    def peak(self, dtype: str, eight_bit: bool) -> float:
        """Operations per second of products in this type; with 8-bit weights, where products of 8 bits exist."""
        if eight_bit and self.fp8:
            return self.fp8
        return self.f32 if dtype == "float32" else self.bf16


# What of the peaks real programs reach: an assumption, the same for all devices, so that ratios hardly depend on it.
COMPUTE_SHARE, BANDWIDTH_SHARE, LINK_SHARE = 0.6, 0.8, 0.8

_NVLINK, _PCIE, _MEMORY = 10e-6, 25e-6, 5e-6
# Collectives start as soon as they can and end as late; and those of two halves of a prefill (see `model.partition`)
# are not put together again, as XLA does with independent ones up to this size.
_OVERLAPPING = ("--xla_gpu_enable_latency_hiding_scheduler=true",
                *(f"--xla_gpu_{kind}_combine_threshold_bytes={1 << 20}"
                  for kind in ("all_reduce", "all_gather", "reduce_scatter")))
# With registered buffers, NVLink switches reduce by themselves (NVLS), which leaves more of a device to products.
_WITH_SWITCHES = (*_OVERLAPPING, "--xla_gpu_enable_nccl_user_buffers=true")

_ALL = (
    # NVIDIA A10 data sheet: 24 GB, 600 GB/s, 125 TFLOPS BF16 without sparsity, 31.2 FP32; PCIe 4.0, 64 GB/s both ways.
    Hardware("a10", 24e9, 600e9, 125e12, 31.2e12, None, 32e9, _PCIE, xla_flags=_OVERLAPPING),
    # NVIDIA A100 data sheet: 1,555 and 2,039 GB/s, 312 TFLOPS BF16, 19.5 FP32; NVLink 600 GB/s both ways.
    Hardware("a100-40", 40e9, 1555e9, 312e12, 19.5e12, None, 300e9, _NVLINK, xla_flags=_OVERLAPPING),
    Hardware("a100", 80e9, 2039e9, 312e12, 19.5e12, None, 300e9, _NVLINK, xla_flags=_OVERLAPPING),
    # NVIDIA H100 (SXM) data sheet: 80 GB, 3.35 TB/s, 989 TFLOPS BF16 and 1,979 FP8 without sparsity, 67 FP32; NVLink
    # 900 GB/s both ways.
    Hardware("h100", 80e9, 3350e9, 989e12, 67e12, 1979e12, 450e9, _NVLINK, xla_flags=_WITH_SWITCHES),
    # NVIDIA H200 data sheet: 141 GB, 4.8 TB/s, otherwise as H100.
    Hardware("h200", 141e9, 4800e9, 989e12, 67e12, 1979e12, 450e9, _NVLINK, xla_flags=_WITH_SWITCHES),
    # Two cores with AVX-512, measured: 28 GB/s, 368 GFLOP/s in bfloat16, 190 in float32. Links are the memory itself.
    Hardware("cpu", 16e9, 28e9, 368e9, 190e9, None, 14e9, _MEMORY, False),
)
HARDWARE = {one.name: one for one in _ALL}


def hardware_of(device_kind: str) -> Hardware:
    """What JAX calls a device (``device.device_kind``). UserError for one that is not described."""
    kind = device_kind.lower()
    for name in ("h200", "h100", "a100-40", "a100", "a10", "cpu"):
        if all(part in kind for part in name.split("-")) and not (name == "a10" and "a100" in kind):
            return HARDWARE[name]
    raise UserError(f"the planner does not know {device_kind}: give tp_size as a number")


def hardware(name: str) -> Hardware:
    """UserError for one that is not described."""
    if name not in HARDWARE:
        raise UserError(f"unknown device {name!r}: use one of {', '.join(HARDWARE)}")
    return HARDWARE[name]
