"""E7: one run on several ranks, measured here, and what the same arithmetic says of sizes that are not here."""

import json
import pickle
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from .. import parallel
from ..blocks import Feedforward, Thick
from ..calculus.attention import ROWS
from ..diagnostics import LiveBytes
from ..estimators import BPTT, Backprop, DyadicEP, Estimator, gradient
from ..files import ROOT
from ..models import LanguageModel
from ..parallel import Part
from ..solvers import Relaxation, Solver

FLOAT = 4  # bytes
ADAM = 4  # arrays of the size of the weights that training holds: they, their gradient, two moments
SOLVER = Relaxation(step=0.8, max_steps=32, tol=0)  # exactly so many steps in either phase, and BPTT's horizon


@dataclass(frozen=True)
class Size:
    """Of a language model of one block, and its batch in sequences."""

    width: int = 64
    heads: int = 4
    context: int = 64
    vocab: int = 64
    batch: int = 16

    def model(self, block: Any) -> LanguageModel:
        torch.manual_seed(0)
        return LanguageModel(vocab=self.vocab, width=self.width, heads=self.heads, context=self.context, block=block)


FEW = replace(SOLVER, max_steps=3)
WIDTHS = 64, 128  # at which bytes are counted that are to be known of larger ones
TOKENS = 1024  # of a batch, at least, so that the gradients of the weights are not most of what is alive
ARMS: dict[str, tuple[Any, Estimator]] = {"ep_linear": (Thick(), DyadicEP()), "bptt": (Thick(), BPTT(steps=SOLVER.max_steps)),
                                          "backprop": (Feedforward(), Backprop())}


def second(estimator: Estimator) -> Solver | None:
    return SOLVER if estimator.second_phase else None


# --- measured

class Sent:
    """Counts the bytes that this rank gives to messages while it lasts: of gradients, and of all else."""

    def __enter__(self) -> "Sent":
        self.gradients = self.others = 0
        self._reduce, self._gather = dist.all_reduce, dist.all_gather_object

        def reduce(tensor: torch.Tensor, *rest: Any) -> Any:
            self.gradients += tensor.numel() * tensor.element_size()
            return self._reduce(tensor, *rest)

        def gather(found: list, value: Any, *rest: Any) -> Any:
            self.others += len(pickle.dumps(value))
            return self._gather(found, value, *rest)

        vars(dist).update(all_reduce=reduce, all_gather_object=gather)
        return self

    def __exit__(self, *error: Any) -> None:
        vars(dist).update(all_reduce=self._reduce, all_gather_object=self._gather)


def step(arm: str, size: Size, rounds: int) -> dict[str, float]:
    """Of one gradient of the batch that all ranks share: this rank's processor time and its part's time, the median of the
    rounds after two that do not count, and the bytes it sent, of the gradient and of all else."""
    block, estimator = ARMS[arm]
    model, part, spent, took = size.model(block), Part.of(size.batch), [], []
    inputs = torch.randint(size.vocab, (size.batch, size.context), generator=torch.Generator().manual_seed(0))[part.rows]
    with Sent() as sent:
        for _ in range(rounds + 2):
            cpu, wall = time.process_time(), time.perf_counter()
            gradient(model, inputs, inputs.roll(-1, 1), estimator=estimator, solver=SOLVER, nudged=second(estimator), part=part)
            spent.append(time.process_time() - cpu)
            took.append(time.perf_counter() - wall)
    return {"cpu": statistics.median_low(spent[2:]), "wall": statistics.median_low(took[2:]),
            "gradient_bytes": sent.gradients / (rounds + 2), "other_bytes": sent.others / (rounds + 2)}


def measure(ranks: int, size: Size, rounds: int) -> dict[str, list[dict[str, float]]]:
    """What `step` says of every arm, from each of so many ranks of one thread; raises RuntimeError with what they said if they
    fail."""
    asked = json.dumps({"size": asdict(size), "rounds": rounds})
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m",
                           __name__, asked], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{ranks} ranks ended with status {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def work(size: Size, rounds: int) -> dict[str, list[dict[str, float]]]:
    """What a rank does."""
    torch.set_num_threads(1)
    return {arm: Part.of(size.batch).pooled(step(arm, size, rounds)) for arm in ARMS}


# --- on paper

def parameters(size: Size) -> int:
    """Of the equilibrium block, embeddings and readout."""
    with torch.device("meta"):
        return sum(value.numel() for value in size.model(Thick()).parameters())


def all_reduced(parameters: int, ranks: int) -> int:
    """Bytes that each rank sends, and receives, where a gradient is summed in a ring: 2 (n - 1) / n of its own (Patarasu &
    Yuan 2009)."""
    return 2 * (ranks - 1) * FLOAT * parameters // ranks


def counted(arm: str, size: Size) -> float:
    """Bytes alive at once for each token of a batch, above what does not grow with the batch. A phase's do not depend on its
    steps (F15), so it takes few."""
    block, estimator = ARMS[arm]
    model, peaks = size.model(block), []
    for batch in (size.batch, 2 * size.batch):
        inputs = torch.zeros(batch, size.context, dtype=torch.long)
        with LiveBytes() as counter:
            gradient(model, inputs, inputs, estimator=estimator, solver=FEW, nudged=FEW if estimator.second_phase else None)
        peaks.append(counter.peak)
    return (peaks[1] - peaks[0]) / (size.batch * size.context)


def per_token(arm: str, size: Size) -> float:
    """The same of a size that is not here, from counts at widths of 64 and 128 with heads and vocabulary in proportion, between
    which it is linear in the width. Of more than twice as many tokens as attention has rows of weights alive (`ROWS`), each
    takes what it takes there."""
    context = min(size.context, 2 * ROWS)
    small, twice = (counted(arm, replace(
        size, width=width, heads=size.heads * width // size.width, vocab=size.vocab * width // size.width, context=context,
        batch=max(1, TOKENS // context))) for width in WIDTHS)
    return small + (twice - small) * (size.width - WIDTHS[0]) / (WIDTHS[1] - WIDTHS[0])


@dataclass(frozen=True)
class Cluster:
    """GPUs, the bytes of memory of each, the bytes a second of its link, its floating-point operations a second."""

    ranks: int = 64
    memory: float = 80e9
    link: float = 50e9
    speed: float = 1e14


@dataclass(frozen=True)
class Planned:
    """One arm on a cluster whose memory is full: bytes for each token, sequences of each rank, force evaluations of a step,
    seconds of it that compute, seconds that sum the gradient."""

    bytes_per_token: float
    sequences: int
    evaluations: int
    computing: float
    summing: float

    @property
    def share(self) -> float:
        """Of the summing in a step."""
        return self.summing / (self.computing + self.summing)


def planned(arm: str, size: Size, cluster: Cluster) -> Planned:
    """An evaluation takes 2 (12 C^2 + 2 T C) operations a token, and readout and loss as much as backpropagation through them;
    the gradient is summed when it is whole, by every arm."""
    weights, each = parameters(size), per_token(arm, size)
    free = cluster.memory - (ADAM + 1) * FLOAT * weights  # the message is one more
    sequences = int(free // (each * size.context))
    block, estimator = ARMS[arm]
    small = Size(context=8)
    inputs = torch.zeros(1, small.context, dtype=torch.long)
    report = gradient(small.model(block), inputs, inputs, estimator=estimator, solver=SOLVER, nudged=second(estimator))
    evaluations = int(report.measured["force_evaluations"])
    operations = 2 * (12 * size.width**2 + 2 * size.context * size.width) * evaluations + 6 * size.width * size.vocab
    return Planned(each, sequences, evaluations, sequences * size.context * operations / cluster.speed,
                   all_reduced(weights, cluster.ranks) / cluster.link)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    with parallel.joined():
        found = work(Size(**asked["size"]), asked["rounds"])
        if parallel.place()[0] == 0:
            print(json.dumps(found))
