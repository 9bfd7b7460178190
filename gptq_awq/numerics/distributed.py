"""Ranks: processes, one per device, that quantize one model together, and their collective communication.

`torchrun --nproc-per-node 2 run.py …` starts two ranks, and so does Slurm with two tasks. Each rank holds the model and
some of the calibration batches, and quantizes some rows of the linears; moments are summed over ranks. Rank 0 alone
computes scores and writes results and the console. A single process is `ONE`, whose methods communicate nothing.

Tensors are sent by nccl between GPUs and by gloo between CPUs, everything else by gloo, which notices at once that a
rank has died.
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
"""Timeout while one rank works alone and the others wait; a rank that dies is still noticed at once."""
AGAIN = "the same command goes on after the last finished block"
"""How to continue a run that lost a rank, at the end of error messages."""


class RankLostError(UserError):
    """Another rank has died or can't be reached, so that no rank can go on."""


@dataclass(frozen=True)
class Ranks:
    """This process as one of the ranks that work on one model.

    All ranks must call the communicating methods, in the same order.

    Attributes:
        rank: this process's rank.
        size: number of ranks.
        place: local rank: this process's number among the ranks of its machine.
        neighbours: number of ranks on its machine.

    Raises (any method that communicates):
        RankLostError: another rank has died, or has not answered in time.
        UserError: another rank has stopped, and left its reason.
    """

    rank: int = 0
    size: int = 1
    place: int = 0
    neighbours: int = 1
    _store: Any = field(default=None, repr=False, compare=False)
    _patient: Any = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which does all work that is done once."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """This rank's device where the option for all ranks is `device`: with "cuda", a GPU of its own.

        Raises:
            UserError: `device` is one particular GPU for several ranks, or there are fewer GPUs than ranks.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise UserError(f"device={device}: is one GPU for {self.size} ranks; each takes its own with device=cuda")
        own = torch.device("cuda", self.place % torch.cuda.device_count())
        torch.cuda.set_device(own)
        taken = self.gather((socket.gethostname(), str(torch.cuda.get_device_properties(own).uuid)))
        if len(set(taken)) < self.size:  # nccl would refuse or hang, and say neither why nor what to do
            raise UserError(f"device={device}: {self.size} ranks have {len(set(taken))} GPUs: start one rank per GPU")
        return own

    def sharing(self, device: torch.device) -> int:
        """Number of ranks that share this device's memory."""
        return 1 if device.type == "cuda" else self.neighbours

    def share(self, costs: Sequence[float]) -> list[int]:
        """Indices of the tasks that this rank takes: by descending cost, each goes to the rank with the least load."""
        loads, taken = [0.0] * self.size, []
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            rank = loads.index(min(loads))
            loads[rank] += costs[task]
            if rank == self.rank:
                taken.append(task)
        return sorted(taken)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum x over ranks, in place (all-reduce), bit for bit equal on every rank."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def maximum_(self, x: Tensor) -> Tensor:
        """Elementwise maximum of x over ranks, in place (all-reduce)."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def copy_(self, x: Tensor) -> Tensor:
        """Broadcast rank 0's x to all ranks, in place."""
        if self.size > 1:
            part = x.contiguous()
            with self._errors_translated(x.device):
                dist.broadcast(part, 0)
            if part is not x:
                x.copy_(part)
        return x

    def gather(self, value: T) -> list[T]:
        """Gather every rank's value on all ranks, in the order of ranks."""
        if self.size == 1:
            return [value]
        with self._errors_translated():
            return [self._broadcast(value, source, None) for source in range(self.size)]

    def from_first(self, compute: Callable[[], T]) -> T:
        """Let rank 0 compute a value and broadcast it; the other ranks wait, however long it takes."""
        value: Any = compute() if self.first else None
        if self.size == 1:
            return value
        with self._errors_translated():
            return self._broadcast(value, 0, self._patient)

    def together(self, compute: Callable[[], T], *errors: type[Exception]) -> T:
        """Compute this rank's value; if any rank raises one of `errors`, all ranks raise it."""
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
        """All-reduce x in place by the operation `how`."""
        if self.size > 1:
            with self._errors_translated(x.device):
                dist.all_reduce(x, how)
        return x

    def _broadcast(self, value: Any, source: int, group: Any) -> Any:
        """Broadcast rank `source`'s value within `group`; tensors on a GPU arrive on this rank's GPU."""
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
        return torch.load(io.BytesIO(content.numpy().tobytes()), map_location=_to_own_gpu, weights_only=False)

    @contextmanager
    def _errors_translated(self, device: torch.device | None = None) -> Iterator[None]:
        """Context manager that turns torch's errors on unreachable ranks into `RankLostError` or `UserError`."""
        try:
            if device is not None and device.type == "cuda":  # nccl would wait for a dead rank, gloo raises
                dist.all_reduce(torch.zeros(1))
            yield
        except RuntimeError as error:
            raise self.lost(str(error)) from error

    def lost(self, error: str) -> UserError:
        """The error to raise where other ranks can't be reached, with the reason of a rank that stopped, if any."""
        with suppress(RuntimeError):
            if self._store.check(["stopped"]):
                return UserError(f"another rank stopped: {self._store.get('stopped').decode()}")
        if "timed out" in error.lower():
            return RankLostError(f"a rank did not answer within ranks_timeout_minutes: {AGAIN}")
        return RankLostError(f"a rank was lost ({error.splitlines()[0]:.200}): {AGAIN}")

    def stopped(self, error: BaseException) -> None:
        """Leave the reason why this rank stops in the store, for the other ranks' error messages."""
        if self.size > 1 and not isinstance(error, RankLostError):
            with suppress(RuntimeError):
                self._store.set("stopped", str(error) or repr(error))


ONE = Ranks()
"""A single process."""


def rank_and_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Rank of this process and number of ranks, as torchrun or srun set them; (0, 1) for a single process."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in environment and size in environment:
            return int(environment[rank]), int(environment[size])
    return 0, 1


@contextmanager
def opened(
    timeout_minutes: float, run: int = 0, environment: Mapping[str, str] = os.environ, device: str = "cpu"
) -> Iterator[Ranks]:
    """Context manager that connects the ranks that were started together.

    Args:
        timeout_minutes: how long a rank waits for others to start, and to finish a computation.
        run: number of the run, where one process makes several.
        environment: environment variables of torchrun or Slurm.
        device: option for all ranks, such as "auto"; nccl is there where it may mean GPUs.

    Raises:
        UserError: the timeout is not a positive number.
        RankLostError: the ranks did not connect in time.
    """
    if not isinstance(timeout_minutes, (int, float)) or timeout_minutes <= 0:
        raise UserError(f"ranks_timeout_minutes={timeout_minutes}: give minutes, such as 30")
    rank, size = rank_and_size(environment)
    if size == 1:
        yield ONE
        return
    on_gpus = not device.startswith("cpu") and torch.cuda.is_available() and dist.is_nccl_available()
    ranks = _connected(rank, size, timedelta(minutes=timeout_minutes), run, environment, on_gpus)
    try:
        with _raising_on_sigterm(ranks, environment):
            yield ranks
            ranks.from_first(lambda: None)  # rank 0 may serve the store: it stays until all are done
    except BaseException as error:
        ranks.stopped(error)
        raise
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _connected(
    rank: int, size: int, timeout: timedelta, run: int, environment: Mapping[str, str], on_gpus: bool
) -> Ranks:
    """Connect to the other ranks by a store and process groups. Raises RankLostError where that fails.

    On GPUs each rank's is current before nccl begins, or all ranks would open the first one. The group isn't bound to
    it (`device_id`): nccl would connect at once, before ranks that share a GPU can be refused in plain words.
    """
    address, port = _store_address(environment)
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT") or environment.get("SLURM_RESTART_COUNT") or "0"
    served = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves the store
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    local = environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID")
    if on_gpus and local is not None:
        torch.cuda.set_device(int(local) % torch.cuda.device_count())
    try:
        server = dist.TCPStore(
            address, port, None, rank == 0 and not served, timeout, wait_for_workers=False, multi_tenant=True
        )
        store = dist.PrefixStore(f"gptq_awq/{attempt}/{run}", server)
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


def _store_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of the store: MASTER_ADDR and MASTER_PORT, else by a Slurm job's first node and its number."""
    nodes = re.match(r"([^,\[]+)(?:\[(\d+))?", environment.get("SLURM_STEP_NODELIST", "localhost"))
    assert nodes is not None  # the pattern matches any text
    address = environment.get("MASTER_ADDR") or nodes[1] + (nodes[2] or "")
    port = environment.get("MASTER_PORT") or 20000 + int(environment.get("SLURM_JOB_ID", 0)) % 20000
    return address, int(port)


@contextmanager
def _raising_on_sigterm(ranks: Ranks, environment: Mapping[str, str]) -> Iterator[None]:
    """Context manager under which SIGTERM raises: torchrun ends this rank by it when another has died."""
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
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # an error is being raised already: let it be reported
        raise
    signal.signal(signal.SIGTERM, before)


def _to_own_gpu(storage: Any, location: str) -> Any:
    """Map location of tensors from another rank: those on a GPU go to this rank's GPU."""
    return storage if location == "cpu" else storage.cuda(torch.cuda.current_device())
