"""One training loop: seeded, resumable, with a progress bar and a record of how the weights were made."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from odlkit.images import atomic
from odlkit.training import distributed, machine

STRIDE = 1_000_003  # between the seeds of a run's streams


def patches(images: Sequence[Tensor], batch: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw ``(batch, C, size, size)`` random crops with random flips and quarter turns from ``(1, C, H, W)`` images."""
    crops = []
    for _ in range(batch):
        draw = torch.randint(2**31, (6,), generator=generator).tolist()
        image = images[draw[0] % len(images)]
        top, left = draw[1] % (image.shape[-2] - size + 1), draw[2] % (image.shape[-1] - size + 1)
        crop = image[..., top : top + size, left : left + size]
        crop = torch.rot90(crop, draw[3] % 4, (-2, -1))
        crops.append(crop.flip(-1) if draw[4] % 2 else crop)
    return torch.cat(crops)


def log_error(outputs: Sequence[Tensor], x: Tensor) -> Tensor:
    """Mean over the items of ``log10 (MSE + 1e-6)``, mostly of the last of the stages' outputs."""
    errors = [torch.log10((v.to(x) - x).square().mean((1, 2, 3)) + 1e-6).mean() for v in outputs]
    before = errors[len(errors) // 2 : -1]
    return errors[-1] + 0.1 * torch.stack(before).mean() if before else errors[-1]


def backward(model: nn.Module, loss: Callable[[torch.Generator], Tensor], streams: Sequence[torch.Generator]) -> Tensor:
    """Put the gradient of the mean loss, over these streams and over the processes, into ``.grad``; returns that mean."""
    values = []
    for stream in streams:
        value = loss(stream)
        values.append(value.detach())
        (value / len(streams)).backward()
    return distributed.average_gradients(model, torch.stack(values).mean())


def fit(
    model: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    lr: float,
    out: Path,
    name: str,
    seed: int = 0,
    resume: bool = False,
    warmup: int = 100,
    final: float = 0.01,
    save_every: int = 200,
    validate: Callable[[], float] | None = None,
    clip: float = 1.0,
    stop: int | None = None,
    compiled: Iterable[nn.Module] = (),
) -> dict:
    """Minimise ``loss(generator)`` over ``model`` with Adam, linear warm-up and cosine decay to ``final lr``.

    A checkpoint (weights, optimiser, step, generator state) is written to ``out / name.pt`` every ``save_every`` steps by
    rename, so that an interrupted run is resumed exactly with ``resume=True``.  ``stop`` ends the run early, at that step of
    the schedule: a phase that another one goes on from.  ``compiled`` are the networks that `odlkit.training.machine`
    compiles where that is asked for.  Returns a record of the run for the weights' card.  Raises ``FloatingPointError``
    when the loss stops being finite, ``ValueError`` where a run is resumed with another number of processes or batch.

    Several processes (`odlkit.training.distributed`) draw from a stream of random numbers each and average their gradients:
    their batch is so many times larger.  Fewer processes that resume such a run go through its streams in turn, to the same
    end; their number must divide that of the streams.
    """
    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / f"{name}.pt"
    how = machine.chosen()
    validate = machine.prepare(list(compiled), validate)
    rank, count = distributed.place()
    streams = [torch.Generator().manual_seed(seed + STRIDE * i) for i in range(count)]
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))
    start, spent, history = 0, 0.0, []
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")  # a run moves between machines
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        if state.get("times", 1) != how.times:
            was = f"{state.get('times', 1)} times the recipe's, as in {checkpoint}"
            raise ValueError(f"batch: expected {was}, got {how.times}")
        kept = state["generator"] if isinstance(state["generator"], list) else [state["generator"]]
        if len(kept) % count:
            raise ValueError(f"resume: expected a number of processes that divides {len(kept)}, this run's, got {count}")
        streams = [torch.Generator() for _ in kept]
        for stream, numbers in zip(streams, kept, strict=True):
            stream.set_state(numbers)
        start, spent, history = state["step"], state["seconds"], state["history"]
    distributed.same(model)
    clock = time.monotonic()
    last = stop or steps
    bar = tqdm(range(start, last), initial=start, total=last, desc=name, mininterval=5, disable=rank > 0)
    smooth = math.nan
    for step in bar:
        rate = min(1.0, (step + 1) / warmup) * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimiser.param_groups:
            group["lr"] = lr * rate
        optimiser.zero_grad(set_to_none=True)
        value = backward(model, loss, streams[rank::count])
        if not torch.isfinite(value):
            raise FloatingPointError(f"{name}: the loss is {value.item()} at step {step}; lower the learning rate")
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
        smooth = value.item() if math.isnan(smooth) else 0.99 * smooth + 0.01 * value.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == last:
            score = validate() if validate else math.nan
            history.append([step + 1, round(smooth, 5), round(score, 3)])
            numbers = distributed.gather([stream.get_state() for stream in streams[rank::count]])
            if rank > 0:
                continue
            tqdm.write(f"{name} step {step + 1}: loss {smooth:.5f}, validation {score:.3f} dB")
            state = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "generator": [numbers[i % count][i // count] for i in range(len(streams))],
                "step": step + 1,
                "times": how.times,
                "seconds": spent + time.monotonic() - clock,
                "history": history,
            }
            with atomic(checkpoint) as handle:
                torch.save(state, handle)
    distributed.gather([])  # nobody reads a checkpoint that is still being written
    return {
        "steps": steps,
        "seed": seed,
        "learning_rate": lr,
        "seconds": round(spent + time.monotonic() - clock),
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
        "history": history[-20:],
        "validation_psnr": history[-1][2] if history else None,
        **({"streams": len(streams)} if len(streams) > 1 else {}),
        **({"machine": asdict(how)} if how != machine.Machine() else {}),
    }


def hardware() -> str:
    """The processor (and GPU, where one is used) in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return f"{cpu}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else cpu


def commit() -> str:
    """The short hash of the checked-out commit, with ``+`` when the tree has changes; ``unknown`` outside git."""
    try:
        here = Path(__file__).parent
        run = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout  # noqa: E731
        return run("rev-parse", "--short", "HEAD").strip() + ("+" if run("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save_weights(model: nn.Module, path: Path, card: dict, dtype: torch.dtype | None = None) -> None:
    """Write ``path`` (.safetensors) and beside it the JSON card, which gets the file's SHA-256 and parameter count.

    ``dtype`` is that of the file (default: the model's own); half precision halves what is shipped.  Of several processes
    the first one writes.
    """
    from safetensors.torch import save_file

    if distributed.place()[0] > 0:
        return
    tensors = {key: value.to(dtype).contiguous() for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path))
    card = card | {
        "dtype": str(next(iter(tensors.values())).dtype),
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")


def ship(
    model: nn.Module,
    out: Path,
    name: str,
    record: dict,
    *,
    what: str,
    data: str,
    network: dict,
    schedule: dict | None = None,
    dtype: torch.dtype | None = torch.float16,
    **more: object,
) -> None:
    """`save_weights` of the recipe ``name``, with the card that they all have and ``fit``'s ``record``."""
    about = {"name": name, "what": what, "recipe": f"odlkit train {name}", "data": data, "network": network}
    save_weights(model, out / f"{name}.safetensors", about | {"schedule": schedule or {}} | more | record, dtype)
