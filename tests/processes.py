"""Run a function in several gloo processes and collect the return values."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from ssl_runner import distributed
from ssl_runner.distributed import group

PATIENCE = 60  # timeout in seconds


def in_processes(W: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run function(*arguments) in W ranks, initialised as by torchrun. Returns the results in rank order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # torch is imported only once
    queue = context.Queue()
    children = [
        context.Process(target=_child, args=(rank, W, port, queue, function, arguments)) for rank in range(W)
    ]
    for child in children:
        child.start()
    results = dict(pickle.loads(queue.get(timeout=PATIENCE)) for _ in children)
    for child in children:
        child.join()
    failures = [text for done, text in results.values() if not done]
    assert not failures, "\n".join(failures)
    return [results[rank][1] for rank in range(W)]


def _child(rank: int, W: int, port: int, queue: Any, function: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(W)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        distributed.start()
        result = function(*arguments)
        queue.put(pickle.dumps((rank, (True, result))))
        if not group._group.ended.is_set():  # set if the function simulates a failing rank
            distributed.finish()
    except BaseException:
        queue.put(pickle.dumps((rank, (False, f"process {rank}: {traceback.format_exc()}"))))
