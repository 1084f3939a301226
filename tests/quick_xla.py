"""XLA flags of tests: what compiles in the least time, for programs that run once or twice on tiny shapes."""

from jaxlib.version import __version__ as jaxlib

# LLVM's passes are left out. The older code generator of jaxlib 0.10 takes a third of the newer one's time, and needs
# fewer memory mappings; later versions do not have it, and refuse the flag.
OLDER_CODE_GENERATOR = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
OLDER = OLDER_CODE_GENERATOR if jaxlib.startswith("0.10.") else ""
QUICK = f"--xla_backend_optimization_level=0{OLDER}"
# Live servers run more than they compile: half a second more for each program, and half the time of a step.
SERVED = f"--xla_backend_optimization_level=1{OLDER}"
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
