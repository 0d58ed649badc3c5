"""Several processes: the same hypergradients and weights as one, a lost process is told, runs go on with fewer."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import multiprocessing, nn

from odlkit.bilevel import Implicit, Truncated, Unrolled, descent, hypergradient
from odlkit.training import distributed, loop
from odlkit.training.distributed import everywhere, joined, mine, over_tasks

TIMEOUT = 60.0
WAYS = {
    "unrolled": Unrolled(),
    "checkpointed": Unrolled("checkpointed"),
    "truncated": Truncated(4),
    "cg": Implicit("cg", tol=1e-12),
    "neumann": Implicit("neumann", tol=1e-12),
}


def problem() -> tuple[torch.Tensor, ...]:
    """Data above and below, and parameters: a weight a feature, for a ridge regression that half of the data train."""
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*size, generator=g, dtype=torch.float64) for size in ((8, 3), (8,), (8, 3), (8,), (3,), (3,)))


def hypergradients() -> dict[str, torch.Tensor]:
    """Of a mean over data in both levels, this process seeing its part."""
    X, y, Z, t, w, start = problem()
    X, y, Z, t = map(mine, (X, y, Z, t))

    def lower(u, w):
        return (torch.tanh(X @ u) - y).square().mean() + (w.exp() * u.square()).sum() / 2

    def upper(u, w):
        return (torch.tanh(Z @ u) - t).square().mean() + 0.1 * (u * w).sum()

    def way(name):
        step = descent(everywhere(lower, value=name == "unrolled"), 0.1)
        return hypergradient(step, everywhere(upper), w, start, steps=12, way=WAYS[name], strict=False).gradient

    tasks = list(torch.arange(5.0, dtype=torch.float64))
    return {name: way(name) for name in WAYS} | {"tasks": over_tasks(lambda a: (a * w).sin(), tasks)}


def train(
    out: Path, steps: int = 6, stop: int | None = None, resume: bool = False, both: bool = False, on=lambda k: None
) -> dict:
    """A small network on random data; ``both``: one process draws what two draw, as one loss."""
    torch.manual_seed(distributed.place()[0])  # unequal starts: the first process' counts
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    second, seen = torch.Generator().manual_seed(loop.STRIDE), [0]

    def one(generator):
        x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        return (net(x)[:, 0] - x.sin().sum(1)).square().mean()

    def loss(generator):
        seen[0] += 1
        on(seen[0])
        return (one(generator) + one(second)) / 2 if both else one(generator)

    record = loop.fit(net, loss, steps=steps, lr=0.1, out=out, name="net", warmup=1, save_every=3, stop=stop, resume=resume)
    return {"streams": record.get("streams", 1), **net.state_dict()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    out = Path(folder)
    with joined(TIMEOUT, init_method=f"file://{out}/meet", rank=rank, world_size=2) as (place, count):
        assert (place, count) == (rank, 2)
        found = {"hypergradients": hypergradients(), "through": train(out / "through"), "half": train(out / "half", stop=3)}
        with pytest.raises(ValueError, match="2 processes can share evenly, got 3 items"):
            mine(torch.zeros(3))
        with pytest.raises(ValueError, match="expected one a process at least, 2, got 1"):
            over_tasks(torch.sin, [torch.zeros(1)])
    torch.save(found, out / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[dict]]:
    """What two processes found, each by its own account, and where they trained."""
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_have_the_hypergradients_of_one(two):
    alone = hypergradients()
    for found in two[1]:
        for name, value in alone.items():
            assert (found["hypergradients"][name] - value).abs().max() <= 1e-12 * value.abs().max(), name


def test_a_part_of_the_data_has_another_one(monkeypatch):
    """The control: without the averages a process has the hypergradient of its part."""
    alone = hypergradients()["unrolled"]
    monkeypatch.setitem(globals(), "mine", lambda x: x[::2])
    assert (hypergradients()["unrolled"] - alone).abs().max() > 1e-2 * alone.abs().max()


def test_two_processes_train_the_weights_of_one(two, tmp_path):
    alone = train(tmp_path, both=True)
    for found in two[1]:
        assert found["through"]["streams"] == 2
        for key in alone.keys() - {"streams"}:
            assert (found["through"][key] - alone[key]).abs().max() <= 1e-12


def test_one_process_goes_on_where_two_stopped(two, tmp_path):
    folder, (first, _) = two
    done = train(folder / "half", resume=True)
    for key in done.keys() - {"streams"}:
        assert (done[key] - first["through"][key]).abs().max() <= 1e-12 and not torch.equal(done[key], first["half"][key])
    state = torch.load(folder / "through" / "net.pt", weights_only=True)
    state["generator"] = state["generator"][:1]
    torch.save(state, tmp_path / "net.pt")
    assert train(tmp_path, steps=7, resume=True)["streams"] == 1  # a run of one stays one


def test_a_number_of_processes_that_does_not_fit_is_refused(two, monkeypatch):
    monkeypatch.setattr(distributed, "place", lambda: (0, 3))
    with pytest.raises(ValueError, match="resume: expected a number of processes that divides 2, this run's, got 3"):
        train(two[0] / "through", resume=True)


def lost(rank: int, folder: str, how: str, timeout: float, ready) -> None:
    """The second process is killed or stops to answer at its third step; the first says what it sees."""
    torch.set_num_threads(1)
    out, clock = Path(folder), [0.0]

    def at(k: int) -> None:
        clock[0] = time.monotonic()
        if rank == 1 and k == 3:
            os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else time.sleep(6 * timeout)

    ready.wait(200)  # a process starts slowly on a busy machine
    try:
        with joined(timeout, init_method=f"file://{out}/meet", rank=rank, world_size=2):
            train(out, steps=50, on=at)
    except distributed.LostProcess as error:
        (out / "told").write_text(f"{time.monotonic() - clock[0]}\n{error}")


@pytest.mark.parametrize("how", ["killed", "stuck"])
def test_a_lost_process_is_told_within_the_timeout(how, tmp_path):
    timeout, context = 5.0, multiprocessing.get_context("spawn")
    more = (str(tmp_path), how, timeout, context.Barrier(2))
    both = [context.Process(target=lost, args=(rank, *more)) for rank in range(2)]
    for process in both:
        process.start()
    both[0].join(240)
    both[1].kill()
    assert both[0].exitcode == 0, "the first process hangs"
    seconds, text = (tmp_path / "told").read_text().split("\n", 1)
    assert float(seconds) < timeout + 5
    assert text.startswith(
        "process 0 of 2: no answer from the others, one was killed or is stuck; start again with --resume"
    )


RECIPE = """
import sys
import torch
from odlkit import cli, training
from odlkit.training.loop import fit, save_weights

def make(out, resume):
    net = torch.nn.Linear(3, 1)
    loss = lambda g: (net(torch.randn(4, 3, generator=g)) - 1).square().mean()
    save_weights(net, out / "tiny.safetensors", fit(net, loss, steps=2, lr=0.1, out=out, name="tiny", resume=resume))

if __name__ == "__main__":
    training.RECIPES["tiny"] = "tiny_recipe:make"
    cli.main(sys.argv[1:])
"""


def test_torchrun_trains_a_recipe(tmp_path):
    (tmp_path / "tiny_recipe.py").write_text(RECIPE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # a free port
    command = [
        *launch,
        str(tmp_path / "tiny_recipe.py"),
        "train",
        "tiny",
        "--out",
        str(tmp_path / "out"),
        "--timeout",
        "100",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "tiny.json").read_text())["streams"] == 2
    assert done.stdout.count("tiny step 2") == 1  # one of them speaks
