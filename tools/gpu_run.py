"""Check and measure everything on this machine's GPU within a time limit.

    python tools/gpu_run.py --output results --minutes 8

Each step runs in a process of its own with its own limit, so that a crash or a hang loses only that step. Every step
writes its output to ``<output>/<step>.log``, and the benchmarks their CSV files, as soon as it has results.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TAIL_LINES = 12
GRACE_SECONDS = 20  # from Ctrl-C until a step that does not stop is killed


def steps(output: Path, python: str, data_dir: str | None) -> list[tuple[str, float, list[str]]]:
    """(name, largest share of the remaining time, command) in the order of importance."""
    bench, common = str(ROOT / "benchmarks"), ["--device", "cuda", "--output", str(output)]
    low = ["--dtype", "float16,float32"]
    spread = ["-n", "auto", "--maxprocesses", "16", "--dist", "worksteal"]  # Triton's compiler takes most of the time
    plan = [
        ("build", 0.4, [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]),
        ("checks", 0.4, [python, "-m", "cxv_kernels"]),
        ("tests", 0.4, [python, "-m", "pytest", "-m", "gpu", *spread, str(ROOT / "tests" / "ops")]),
        ("attn_mem", 0.4, [python, f"{bench}/attn_mem.py", *common, *low]),
        ("model_step", 0.5, [python, f"{bench}/model_step.py", *common, "--models", "cpv-5/4", *low]),
        ("attn_speed", 0.9, [python, f"{bench}/attn_speed.py", *common, *low]),
    ]
    if data_dir:
        command = [python, f"{bench}/paper/cifar10.py", "--device", "cuda", "--data-dir", data_dir]
        plan.append(("cifar10", 1.0, [*command, "--runs", str(output / "cifar10")]))
    return plan


def architectures(python: str) -> str:
    """setup.py's default and this machine's GPUs: their driver would compile the PTX for a minute at the first call."""
    code = "import torch as t\nfor i in range(t.cuda.device_count()): print('%d.%d' % t.cuda.get_device_capability(i))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.split()
    return ";".join(["7.5+PTX", *sorted({*found} - {"7.5"})])


def run(name: str, command: Sequence[str], seconds: float, output: Path) -> str:
    """Run one step; its outcome in words.

    A step that is late gets Ctrl-C: then pytest lists its failures and a training run saves its state. What is left of
    it, also compilers and test processes, is killed, because it would disturb the measurements of the next steps.
    """
    environment = os.environ | {"CXV_TEST_GPU": "1", "PYTHONUNBUFFERED": "1"}  # the log of a killed step is complete
    with (output / f"{name}.log").open("w") as log:
        streams = {"stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **streams, cwd=ROOT, env=environment, start_new_session=True)
        try:
            status = process.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            if isinstance(reason, KeyboardInterrupt):
                raise
            return "stopped at its time limit"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "ok" if status == 0 else f"exit status {status}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps, print a table last; 1 if a step failed."""
    parser = argparse.ArgumentParser("gpu_run", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("gpu_run"), help="folder of the logs and CSV files")
    parser.add_argument("--minutes", type=float, default=8, help="limit of the whole run")
    parser.add_argument("--no-build", action="store_true", help="use the installed kernels")
    parser.add_argument("--data-dir", help="CIFAR-10 as train/CLASS/… and test/CLASS/…: train with the remaining time")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so would the steps
    arguments.output.mkdir(parents=True, exist_ok=True)
    output, start, outcomes = arguments.output.resolve(), time.monotonic(), []
    if not arguments.no_build:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(sys.executable))
        os.environ.setdefault("NVCC_APPEND_FLAGS", "--threads 0")  # compiles the architectures side by side
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]  # Triton's kernels need no build
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    for name, share, command in steps(output, sys.executable, arguments.data_dir):
        if name == "build" and arguments.no_build:
            continue
        remaining = 60 * arguments.minutes - (time.monotonic() - start)
        if remaining < 15:
            outcomes.append((name, 0.0, "skipped: no time left"))
            continue
        began = time.monotonic()
        outcome = run(name, command, share * remaining, output)
        outcomes.append((name, time.monotonic() - began, outcome))
        tail = (output / f"{name}.log").read_text(errors="replace").splitlines()[-TAIL_LINES:]
        print(f"--- {name}: {outcome}", *tail, sep="\n", flush=True)
    print(f"\n{'step':12} {'seconds':>8}  outcome")
    for name, seconds, outcome in outcomes:
        print(f"{name:12} {seconds:8.0f}  {outcome}")
    print(f"Logs and CSV files: {output}")
    return int(any(outcome.startswith("exit") for _, _, outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
