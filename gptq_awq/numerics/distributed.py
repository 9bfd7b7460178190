"""Ranks: the processes, one to a device, that quantize one model together; and the few words they exchange.

`torchrun --nproc-per-node 2 run.py …` starts two, and so does Slurm with two tasks. Each holds the model and some of
the calibration batches, and takes some rows of the linears; moments are summed. Rank 0 does alone whatever is there
once: scores, results, the console. A process that was started by itself is `ONE`, to which all of this costs nothing.

Tensors go by nccl between GPUs and by gloo between CPUs, all else by gloo, which sees at once that a rank has died.
"""

import io
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gptq_awq.errors import UserError

T = TypeVar("T")
PATIENT = timedelta(days=365)
"""How long ranks wait for what one of them does alone; one that dies is noticed at once all the same."""
AGAIN = "the same command goes on after the last finished block"


class RankLostError(UserError):
    """Another rank has died, or can't be reached: no rank can go on."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that work on one model.

    Whatever is asked of `Ranks` is asked by all of them, in one and the same order.

    Attributes:
        rank: this one's number.
        size: how many there are.
        place: this one's number among those of its machine.
        neighbours: how many are on its machine.

    Raises (any method that speaks to other ranks):
        RankLostError: one of them has died, or has not answered in time.
        UserError: one of them has stopped, and said why.
    """

    rank: int = 0
    size: int = 1
    place: int = 0
    neighbours: int = 1
    _store: Any = field(default=None, repr=False, compare=False)
    _patient: Any = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this one does what is there to be done once."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """This rank's own, where all were given `device`.

        Raises:
            UserError: one GPU for all.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise UserError(f"device={device}: is one GPU for {self.size} ranks; each takes its own with device=cuda")
        own = torch.device("cuda", self.place % torch.cuda.device_count())
        torch.cuda.set_device(own)
        return own

    def sharing(self, device: torch.device) -> int:
        """How many ranks share this device's memory."""
        return 1 if device.type == "cuda" else self.neighbours

    def share(self, costs: Sequence[float]) -> list[int]:
        """Which of some tasks this rank takes: the dearest first, each to whoever has least to do."""
        loads, taken = [0.0] * self.size, []
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            rank = loads.index(min(loads))
            loads[rank] += costs[task]
            if rank == self.rank:
                taken.append(task)
        return sorted(taken)

    def sum_(self, x: Tensor) -> Tensor:
        """Σ over ranks of x, in place, the same bits on every rank."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def maximum_(self, x: Tensor) -> Tensor:
        """The greatest of all ranks' x, element by element, in place."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def copy_(self, x: Tensor) -> Tensor:
        """Rank 0's x, in place."""
        if self.size > 1:
            part = x.contiguous()
            with self._reaching(x.device):
                dist.broadcast(part, 0)
            if part is not x:
                x.copy_(part)
        return x

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        with self._reaching():
            return [self._sent(value, source, None) for source in range(self.size)]

    def from_first(self, compute: Callable[[], T]) -> T:
        """What rank 0 computes, however long it takes; the others wait."""
        value: Any = compute() if self.first else None
        if self.size == 1:
            return value
        with self._reaching():
            return self._sent(value, 0, self._patient)

    def together(self, compute: Callable[[], T], *errors: type[Exception]) -> T:
        """What this rank computes; one of `errors` that any rank raises is raised on all."""
        value: Any = None
        own: Exception | None = None
        try:
            value = compute()
        except errors as error:
            own = error
        raised = next((error for error in self.gather(own) if error is not None), None)
        if raised is not None:
            raise own or raised
        return value

    def _reduced(self, x: Tensor, how: Any) -> Tensor:
        if self.size > 1:
            with self._reaching(x.device):
                dist.all_reduce(x, how)
        return x

    def _sent(self, value: Any, source: int, group: Any) -> Any:
        """Rank `source`'s value; tensors on a GPU come to be on this rank's."""
        buffer = io.BytesIO()
        if self.rank == source:
            torch.save(value, buffer)
        count = torch.tensor([buffer.tell()])
        dist.broadcast(count, source, group)
        if self.rank == source:
            dist.broadcast(torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8), source, group)
            return value
        content = torch.empty(int(count), dtype=torch.uint8)
        dist.broadcast(content, source, group)
        return torch.load(io.BytesIO(content.numpy().tobytes()), map_location=_here, weights_only=False)

    @contextmanager
    def _reaching(self, device: torch.device | None = None) -> Iterator[None]:
        """Within: what the library says of ranks that can't be reached is said in our words."""
        try:
            if device is not None and device.type == "cuda":  # nccl would wait for a dead rank: gloo does not
                dist.all_reduce(torch.zeros(1))
            yield
        except RuntimeError as error:
            raise self.lost(str(error)) from error

    def lost(self, error: str) -> UserError:
        """What to raise where other ranks can't be reached: a reason that one of them left, if any did."""
        with suppress(RuntimeError):
            if self._store.check(["stopped"]):
                return UserError(f"another rank stopped: {self._store.get('stopped').decode()}")
        if "timed out" in error.lower():
            return RankLostError(f"a rank did not answer within ranks_timeout_minutes: {AGAIN}")
        return RankLostError(f"a rank was lost ({error.splitlines()[0]:.200}): {AGAIN}")

    def stopped(self, error: BaseException) -> None:
        """Leave word for the other ranks of why this one stops."""
        if self.size > 1 and not isinstance(error, RankLostError):
            with suppress(RuntimeError):
                self._store.set("stopped", str(error) or repr(error))


ONE = Ranks()
"""A process by itself."""


def rank_and_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process's number among those that torchrun, or srun, has started with it, and how many they are."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in environment and size in environment:
            return int(environment[rank]), int(environment[size])
    return 0, 1


@contextmanager
def opened(timeout_minutes: float, run: int = 0, environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Within: the ranks that were started together can speak to each other.

    Args:
        timeout_minutes: how long a rank waits for others that compute, and for them to start.
        run: number of the run, where one process makes several.
        environment: says who they are.

    Raises:
        UserError: a timeout that is none.
        RankLostError: they did not find each other.
    """
    if not isinstance(timeout_minutes, (int, float)) or timeout_minutes <= 0:
        raise UserError(f"ranks_timeout_minutes={timeout_minutes}: give minutes, such as 30")
    rank, size = rank_and_size(environment)
    if size == 1:
        yield ONE
        return
    ranks = _met(rank, size, timedelta(minutes=timeout_minutes), run, environment)
    try:
        with _told_to_stop(ranks, environment):
            yield ranks
            ranks.from_first(lambda: None)  # the store may be rank 0's own: it stays until all are done
    except BaseException as error:
        ranks.stopped(error)
        raise
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _met(rank: int, size: int, timeout: timedelta, run: int, environment: Mapping[str, str]) -> Ranks:
    address, port = _meeting_point(environment)
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT") or environment.get("SLURM_RESTART_COUNT") or "0"
    served = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        meeting = dist.TCPStore(
            address, port, None, rank == 0 and not served, timeout, wait_for_workers=False, multi_tenant=True
        )
        store = dist.PrefixStore(f"gptq_awq/{attempt}/{run}", meeting)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        patient = dist.new_group(backend="gloo", timeout=PATIENT)
    except (RuntimeError, ValueError) as error:
        raise RankLostError(
            f"rank {rank} of {size} did not meet the others at {address}:{port} (MASTER_ADDR, MASTER_PORT) within "
            f"ranks_timeout_minutes={timeout.total_seconds() / 60:g}: {str(error).splitlines()[0]:.200}"
        ) from error
    hosts = Ranks(rank, size, _store=store, _patient=patient).gather(socket.gethostname())
    own = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    return Ranks(rank, size, own.index(rank), len(own), store, patient)


def _meeting_point(environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of the store: as given, or the first node of a Slurm job and a port made of its number."""
    nodes = re.match(r"([^,\[]+)(?:\[(\d+))?", environment.get("SLURM_STEP_NODELIST", "localhost"))
    assert nodes is not None  # of any text
    address = environment.get("MASTER_ADDR") or nodes[1] + (nodes[2] or "")
    port = environment.get("MASTER_PORT") or 20000 + int(environment.get("SLURM_JOB_ID", 0)) % 20000
    return address, int(port)


@contextmanager
def _told_to_stop(ranks: Ranks, environment: Mapping[str, str]) -> Iterator[None]:
    """Within: where torchrun ends this rank, since another has died, it says so."""
    if "TORCHELASTIC_RUN_ID" not in environment or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise ranks.lost("torchrun ends this one")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # an error is on its way already: let it be told
        raise
    signal.signal(signal.SIGTERM, before)


def _here(storage: Any, location: str) -> Any:
    """Where a tensor from another rank goes: a GPU's to this rank's own."""
    return storage if location == "cpu" else storage.cuda(torch.cuda.current_device())
