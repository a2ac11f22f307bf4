"""What torch.compile does in a run."""

import torch

from ssl_runner import distributed
from ssl_runner.data.loader import MultiViewLoader
from ssl_runner.solver import Solver
from ssl_runner.views import Augment

# Training steps after which torch.compile has repaid itself on CUDA. Estimated: 60 s to compile a ResNet-18
# and its views, and 4 ms saved in each step of 512 images.
REPAID_STEPS = 15_000


def choose(compile: str | bool, device: torch.device, steps: int, ranks: int) -> str:
    """Return what torch.compile does in a run with `steps` training steps per view size: off, on or graphs.

    `auto` is on if CUDA repays the compilation, see REPAID_STEPS. It is off with several processes, where
    every synchronised batch norm ends a compiled part.
    """
    if compile == "auto":
        compile = device.type == "cuda" and ranks == 1 and steps >= REPAID_STEPS
    if isinstance(compile, bool):
        return "on" if compile else "off"
    return compile


def compile_solver(
    compile: str | bool, solver: Solver, loader: MultiViewLoader, before: str | None = None
) -> str:
    """Compile what a step runs, as the option `compile` asks for. Returns what is done: off, on or graphs.

    A run that resumes does the same as `before`, since compiled networks round differently.
    """
    sizes = len(set(loader.resolutions))
    steps = solver.total_epochs * loader.steps_per_epoch // sizes
    mode = before or choose(compile, loader.device, steps, distributed.world_size())
    if mode == "off":
        return mode
    # dynamo counts what it compiles in a process, and beyond its limit runs without compiling
    torch.compiler.reset()
    dynamo = torch._dynamo.config
    in_a_step = len(set(loader.augment.sizes)) if isinstance(loader.augment, Augment) else 1
    graphs = sizes * in_a_step + 8  # 8 for evaluators
    dynamo.cache_size_limit = max(dynamo.cache_size_limit, graphs)
    reason = solver.compile(graphs=mode == "graphs")
    if reason and distributed.is_main_process():
        print(f"compile=graphs: {reason}: the network and the views are compiled only", flush=True)
    return "on" if reason else mode
