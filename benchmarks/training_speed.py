"""What training takes: the loader against the step, an epoch fused and not, and the start of a resumed run.

    python benchmarks/training_speed.py --data-dir cifar10    # train/CLASS/… and test/CLASS/…, or torchvision's archive

**loader**: images/s of ``cxv.training.data.batches`` alone, over the whole training set mapped from the cache,
shuffled, plain and with the paper's two RandAugments. **epoch**: seconds of an epoch of ``cxv train`` (training and
evaluation) on ``--images`` images, with the fused kernels and with the reference, runs in turn, each run's first epoch
left out. **resume**: seconds from the call of ``cxv.training.train`` to its first batch, with every image and CPV-5/4.
"""

import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import Parser, environment, gpu_facts, positive, timing_json, write_json
from memory import Timing, interleaved

from cxv.training import TrainConfig, train
from cxv.training.augment import RandAugment
from cxv.training.config import ARGS, METRICS
from cxv.training.data import Data, batches, load_data

MODELS = ("cpv-5/4", "cnv-5/4", "cltv-5/4")
AUGMENTS = {"plain": None, "RandAugment 1,1": RandAugment(1, 1), "RandAugment 3,3": RandAugment(3, 3)}
PARTS = ("loader", "epoch", "resume")
LOADED = 8192  # images of one repetition
WANTED = {"loader": 3.0, "epoch": 1.5, "resume": 2.0}  # times the step's rate, times the reference's, seconds at most


def main() -> int:
    """The command line."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_shared("training_speed-<device>.json")
    parser.add_argument("--data-dir", required=True, help="the images")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--images", type=positive, default=256, help="a training epoch has; half of them test it")
    parser.add_argument("--batch-size", type=positive, default=128)
    parser.add_argument("--rounds", type=positive, default=3, help="runs of each model, fused and not")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="comma-separated; the file keeps what it has of others"
    )
    args = parser.parse_args()
    parser.check_shared(args)
    device = torch.device(args.device)
    path = args.out / f"training_speed-{device.type}.json"
    results: dict[str, Any] = {"benchmark": "training_speed", "parts": {}}
    if path.exists():
        results = parser.results("--out", path, "training_speed")
    for part in args.parts.split(","):
        if part not in PARTS:
            parser.error(f"argument --parts: must be some of {', '.join(PARTS)}, got {part!r}")
        where = environment(device, torch.float32) | gpu_facts(device)
        results["parts"][part] = {"environment": where, "wanted": WANTED[part]} | globals()[f"_{part}"](args, device)
        write_json(path, results)
    print(table(results["parts"]))
    return 0


def _data(args: Any) -> tuple[str, Data]:
    name = "folder" if (Path(args.data_dir) / "train").is_dir() else "cifar10"
    return name, load_data(name, args.data_dir)


def _loader(args: Any, device: torch.device) -> dict[str, Any]:
    _, data = _data(args)

    def load(augment: RandAugment | None) -> None:
        generator = torch.Generator().manual_seed(0)
        source = batches(data.train, args.batch_size, device, generator, augment=augment)
        for _ in itertools.islice(source, LOADED // args.batch_size):
            pass

    runs = [lambda augment=augment: load(augment) for augment in AUGMENTS.values()]
    for run in runs:
        run()
    timings = interleaved(runs, device, budget=5.0, limit=20.0)
    images = LOADED // args.batch_size * args.batch_size
    return {
        "images": images,
        "rows": {
            name: {"images_per_second": images / timing.median, **timing_json(timing)}
            for name, timing in zip(AUGMENTS, timings, strict=True)
        },
    }


def _epoch(args: Any, device: torch.device) -> dict[str, Any]:
    name, _ = _data(args)
    rows: dict[str, Any] = {}
    for model in args.models.split(","):
        seconds: dict[bool, list[float]] = {True: [], False: []}
        rates: dict[bool, list[float]] = {True: [], False: []}
        for _, fused in itertools.product(range(args.rounds), (True, False)):
            for row in _epochs(args, name, model, fused, device)[1:]:
                seconds[fused].append(row["seconds"])
                rates[fused].append(row["images_per_second"])
        fused, reference = (Timing(tuple(seconds[way])) for way in (True, False))
        rows[model] = {
            "fused": timing_json(fused) | {"images_per_second": max(rates[True])},
            "reference": timing_json(reference) | {"images_per_second": max(rates[False])},
            "speedup": reference.median / fused.median,
        }
    return {"images": args.images, "test_images": args.images // 2, "batch_size": args.batch_size, "rows": rows}


def _epochs(args: Any, data: str, model: str, fused: bool, device: torch.device) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=model,
            data=data,
            data_dir=args.data_dir,
            output=str(Path(folder) / "run"),
            optimizer="adamw",
            epochs=3,
            batch_size=args.batch_size,
            limit_train=args.images,
            limit_test=args.images // 2,
            fused=fused,
            device=str(device),
        )
        train(config, log=lambda line: None)
        return [json.loads(line) for line in (Path(config.output) / METRICS).read_text().splitlines()]


def _resume(args: Any, device: torch.device) -> dict[str, Any]:
    name, data = _data(args)
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        config = TrainConfig(
            model="cpv-5/4", data=name, data_dir=args.data_dir, output=str(output), recipe="paper", device=str(device)
        )
        _run_to_first_batch(config, output)
        for _ in range(args.rounds):
            samples.append(_run_to_first_batch(TrainConfig(output=str(output), resume=True), output))
    images = {name: len(split) for name, split in data.splits.items()}
    return {"model": "cpv-5/4", "images": images, "rows": timing_json(Timing(tuple(samples)))}


def _run_to_first_batch(config: TrainConfig, output: Path) -> float:
    """Seconds that a run takes to its first batch, after which it is stopped by SIGTERM: args.json is written then."""
    (output / ARGS).unlink(missing_ok=True)
    seconds = []

    def stop() -> None:
        while not (output / ARGS).exists():
            time.sleep(0.001)
        seconds.append(time.perf_counter() - start)
        time.sleep(1)  # until it is in its epoch
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop)
    start = time.perf_counter()
    watcher.start()
    try:
        train(config, log=lambda line: None)
    except KeyboardInterrupt:
        watcher.join()
        return seconds[0]
    raise RuntimeError("the run was over before it could be stopped")


def table(parts: dict[str, Any]) -> str:
    """The numbers in Markdown."""
    lines = []
    if "epoch" in parts:
        lines += ["| an epoch | fused, s | reference, s | speed-up | images/s, fused |", "|---|---:|---:|---:|---:|"]
        lines += [
            f"| {model} | {row['fused']['median_s']:.2f} | {row['reference']['median_s']:.2f} "
            f"| {row['speedup']:.2f}× | {row['fused']['images_per_second']:.0f} |"
            for model, row in parts["epoch"]["rows"].items()
        ]
    if "loader" in parts:
        fastest = max(
            (r["fused"]["images_per_second"] for r in parts.get("epoch", {}).get("rows", {}).values()), default=0
        )
        lines += ["", "| the loader alone | images/s | × the fastest step |", "|---|---:|---:|"]
        for name, row in parts["loader"]["rows"].items():
            times = f"{row['images_per_second'] / fastest:.0f}" if fastest else "not measured"
            lines.append(f"| {name} | {row['images_per_second']:,.0f} | {times} |")
    if "resume" in parts:
        row = parts["resume"]["rows"]
        lines += [
            "",
            f"A resumed run is at its first batch after {row['median_s']:.2f} s, every image of the set at hand.",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
