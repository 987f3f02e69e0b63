"""A GPU that is not in this machine, as far as torch's compiler needs one.

torch compiles ahead of time for the GPU at hand alone (github.com/pytorch/pytorch/issues/153697). All that it
needs of that GPU is what kind it is, and that kernels are tried on it, of which the fastest is taken.
`pretend` answers the first, and lets torch take the first kernel that it would try. The code is the same
otherwise: Triton's own ptxas compiles kernels for any GPU.

What `pretend` changes belongs to torch and to Triton, and is not documented. So it is used with the versions
that were tried alone, and in a process that ends afterwards.
"""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lcm_compile.system.versions import installed_version
from lcm_compile.targets import GpuTarget

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

# The versions of torch that were tried; each comes with its own version of Triton.
TRIED = ("2.11.0",)
INSTALL = f"pip install torch=={TRIED[-1]}, a build for CUDA, or the extra cross"
# The code that runs on the processor of the GPU's machine is for any x86-64 with AVX2.
MACHINE, HOST = "x86_64", "x86-64-v3"
HOST_FEATURES = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "sse4_1", "sse4_2")


@dataclass(frozen=True)
class Properties:
    """What torch's compiler asks of a GPU, under torch's names for it. Memory is in bytes."""

    multi_processor_count: int
    max_threads_per_multi_processor: int
    shared_memory_per_block_optin: int
    regs_per_multiprocessor: int = 65536
    max_threads_per_block: int = 1024
    warp_size: int = 32


# By compute capability. Threads and memory are those of the tables in NVIDIA's CUDA programming guide. The
# number of multiprocessors is that of one GPU of the kind (A100, RTX A6000, L40S, H100, B200, RTX PRO 6000):
# it decides how some sums are split, and engines of one kind are shared by all its GPUs.
CAPABILITIES = {
    "8.0": Properties(108, 2048, 163 << 10),
    "8.6": Properties(84, 1536, 99 << 10),
    "8.9": Properties(142, 1536, 99 << 10),
    "9.0": Properties(132, 2048, 227 << 10),
    "10.0": Properties(148, 2048, 227 << 10),
    "12.0": Properties(188, 1536, 99 << 10),
}


def cannot_compile(target: GpuTarget) -> str | None:
    """Returns why torch can't compile here for a GPU that is not here, or None."""
    import torch

    capability = target.compute_capability
    if capability not in CAPABILITIES:
        known = ", ".join(CAPABILITIES)
        return f"without the GPU it compiles for compute capabilities {known}; {target.name} is {capability}"
    if platform.machine() != MACHINE:
        return f"without the GPU it compiles on x86-64 processors only, and this one is {platform.machine()}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; {INSTALL}"
    found = str(installed_version(("torch",))).removeprefix("torch ")
    if found.partition("+")[0] not in TRIED:
        return f"without the GPU it compiles with torch {' or '.join(TRIED)} only, not {found}; {INSTALL}"
    return None


def pretend(target: GpuTarget) -> None:
    """Lets torch and Triton compile for the target as if it were here, for the rest of this process."""
    for owner, name, value in changes(target):
        getattr(owner, name)  # what is replaced must be there
        setattr(owner, name, value)

    import triton.backends.nvidia.driver as nvidia
    from triton.runtime.driver import driver

    driver.set_active(absent_driver(nvidia, target))


def with_fake_weights(
    program: ExportedProgram,
) -> tuple[dict[str, torch.Tensor], AbstractContextManager[Any]]:
    """Replaces a program's arrays by fake ones, which can be moved to any device.

    Returns the arrays themselves, and the context in which the program can be moved.
    """
    import torch
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode([node.meta.get("val") for node in program.graph.nodes])
    assert mode is not None, "torch.export.load gives every node a fake array"

    def fake(array: Any) -> torch.Tensor:
        made = mode.from_tensor(array.detach())
        return torch.nn.Parameter(made, False) if isinstance(array, torch.nn.Parameter) else made

    values = {**program.state_dict, **program.constants}
    for arrays in (program._state_dict, program._constants):
        arrays.update({name: fake(array) for name, array in arrays.items()})
    inputs, named = program.example_inputs
    program._example_inputs = tuple(map(mode.from_tensor, inputs)), named
    return values, mode


def changes(target: GpuTarget) -> list[tuple[Any, str, Any]]:
    """Returns what is changed in torch: modules and classes, the names of what is replaced, and by what.

    The tests hold the source of everything that is replaced to that of the versions that were tried.
    """
    import torch
    import torch._inductor.codegen.wrapper
    import torch._inductor.cpp_builder
    import torch._inductor.fx_passes.joint_graph
    import torch._inductor.graph
    import torch._subclasses.fake_tensor
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_heuristics

    assert target.compute_capability is not None
    major, minor = map(int, target.compute_capability.split("."))
    properties = CAPABILITIES[target.compute_capability]
    found = type(
        "Found", (), {**vars(properties), "name": target.description, "major": major, "minor": minor}
    )
    first_of, flags_of = (
        triton_heuristics.cached_autotune,
        torch._inductor.cpp_builder._get_optimization_cflags,
    )
    state = torch.zeros(16, dtype=torch.uint8)

    def of_any(value: Any) -> Any:
        return staticmethod(lambda *_, **__: value)

    def first_alone(size_hints: Any, configs: Any, *arguments: Any, **options: Any) -> Any:
        return first_of(size_hints, configs[:1], *arguments, **options)

    def for_any_host(*arguments: Any, **options: Any) -> tuple[list[str], list[str]]:
        flags, linked = flags_of(*arguments, **options)
        return [f"march={HOST}" if flag == "march=native" else flag for flag in flags], linked

    return [
        # What the GPU is. Without these torch would ask the driver, which is not here.
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_properties", lambda *_: found),
        (torch.cuda, "get_device_capability", lambda *_: (major, minor)),
        # Blocks that are "on" the device make it the current one, and afterwards the one before.
        (torch.cuda, "_exchange_device", lambda _: 0),
        (torch.cuda, "_maybe_exchange_device", lambda _: 0),
        # The interface by which the compiler asks has copies of these, made when it was imported.
        (CudaInterface, "get_device_properties", of_any(found)),
        (CudaInterface, "exchange_device", of_any(0)),
        (CudaInterface, "maybe_exchange_device", of_any(0)),
        # The state of random numbers is kept while a graph is traced; on a GPU there is none.
        (torch.cuda, "get_rng_state", lambda *_: state),
        (torch.cuda, "set_rng_state", lambda *_: None),
        # The first fake array on a GPU starts CUDA.
        (torch._subclasses.fake_tensor, "init_gpu_context", lambda *_: None),
        # Patterns are looked for by examples, which are arrays on the GPU. Those for attention find products
        # that were not written as attention, and our graphs have no such products; those that pad matrices
        # time both ways.
        (torch._inductor.fx_passes.joint_graph, "lazy_init", lambda *_: None),
        # Weights are fake and all at the address 0, so that two of one shape would be taken for one weight.
        (torch._inductor.graph, "is_same_tensor", lambda one, other: one is other),
        # Of each kernel's configurations the first is compiled, and none is run. A kernel keeps its code for
        # the package after its first run, which is therefore asked for here.
        (triton_heuristics, "cached_autotune", first_alone),
        (
            torch._inductor.codegen.wrapper.PythonWrapperCodegen,
            "generate_and_run_autotune_block",
            keep_kernels,
        ),
        # Host code would be for the processor at hand.
        (torch._inductor.cpp_builder, "_get_optimization_cflags", for_any_host),
    ]


def keep_kernels(wrapper: Any) -> None:
    """Compiles the Triton kernels of a graph, and keeps their code for its package.

    It replaces a method of torch's code generator, which also runs each kernel with arrays of the right size.
    """
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    wrapper.kernel_autotune_defs.splice("\nasync_compile.wait(globals())\n")
    scope: dict[str, Any] = {}
    exec(wrapper.kernel_autotune_defs.getvalue(), scope)
    for kernel in scope.values():
        if isinstance(kernel, CachingAutotuner):
            [launcher] = kernel.launchers
            kernel.save_gpu_kernel(None, launcher)


def absent_driver(nvidia: Any, target: GpuTarget) -> Any:
    """Returns Triton's driver of a GPU that is not here. It loads and launches nothing.

    Triton refuses kernels that need more shared memory than the GPU has, which it asks its driver.
    """
    from triton.backends.compiler import GPUTarget

    assert target.compute_capability is not None
    properties = CAPABILITIES[target.compute_capability]

    class Utils:
        def get_device_properties(self, device: int) -> dict[str, int]:
            return {
                "max_shared_mem": properties.shared_memory_per_block_optin,
                "max_num_regs": properties.regs_per_multiprocessor,
                "multiprocessor_count": properties.multi_processor_count,
                "warpSize": properties.warp_size,
            }

        def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
            # A module, a function, the registers and the spills of a thread, and the most threads of a block.
            return 0, 0, 0, 0, properties.max_threads_per_block

    class AbsentDriver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = Utils(), lambda source, metadata: None

        def get_current_target(self) -> Any:
            return GPUTarget(
                "cuda", int(str(target.compute_capability).replace(".", "")), properties.warp_size
            )

        def get_current_device(self) -> int:
            return 0

    return AbsentDriver()
