"""Training in several CPU processes (gloo), started from a server that has imported everything."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["main", "ldm.models.diffusion", "ldm.train"])


def in_ranks(
    count: int, fn: Callable[..., Any], *args: Any, seconds: float = 300, apart: bool = False
) -> list[Any]:
    """What `fn(*args)` gives in each of so many ranks, started as torchrun would start them.

    Args:
        fn: A function of a module that the ranks can import. What it gives is pickled.
        apart: Each rank as if on a machine of its own, so that all use the first GPU of this one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(count):
        place = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "LOCAL_RANK": rank}
        if apart:
            place |= {"LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "GROUP_RANK": rank}
        mine, theirs = _SERVER.Pipe(duplex=False)
        process = _SERVER.Process(target=_rank, args=(theirs, rank, place, port, fn, args))
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        results = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(seconds), f"rank {rank} has not answered in {seconds} s"
            kind, value = pickle.loads(pipe.recv_bytes())
            assert kind == "done", f"rank {rank}:\n{value}"
            results.append(value)
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(
    pipe: Any, rank: int, place: dict[str, int], port: int, fn: Callable[..., Any], args: tuple
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "GROUP_RANK": "0",
        **{name: str(value) for name, value in place.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    import torch

    torch.set_num_threads(1)
    try:
        answer = "done", fn(*args)
    except BaseException:
        answer = "failed", traceback.format_exc()
    # Not with `send`, which would leave tensors in this process for the other one to fetch.
    pipe.send_bytes(pickle.dumps(answer))
