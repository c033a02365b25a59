"""Builds, checks and measures everything on one GPU, the important first, within a budget of time. See README.md.

Every task runs in a process that may crash, hang or lose the GPU without taking the others along, and the JSON is
written after each: whatever ends the run, what was measured is there. `--resume` with that JSON does the rest.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout, not installed yet
os.environ["KINETO_LOG_LEVEL"] = os.environ.get("KINETO_LOG_LEVEL", "99")

import gpu_checks
import gpu_models
import gpu_report
import gpu_speed
import peers
import torch
from common import Parser, environment, first_line, gpu_facts, seconds, some_of, write_json
from gpu_speed import Settings
from gpu_worker import Emit, Outcome, Worker

from cxv_kernels import _triton, backends

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("triton", "cuda", "cpp")
HALF, MAIN = "float16", (32, 4, 1024, 32)
SECTIONS = (
    "build",
    "ceilings",
    "checks",
    "gradients",
    "graphs",
    "attention",
    "sweep",
    "conv_norm",
    "models",
    "largest_batch",
    "peers",
    "ptx",
    "sanitizer",
)
GRACE = 20.0  # seconds that what is built aside has after the build
PROGRAMS = ("build", "ptx", "sanitizer")  # of the sections: processes that this one only waits for


@dataclasses.dataclass(frozen=True)
class Task:
    """One call of a function of the suite in the worker (or, for what builds and watches, in a program of its own)."""

    section: str
    function: str
    arguments: dict[str, Any]
    limit: float = 60.0  # seconds
    backends: tuple[str, ...] = ()  # only these of the run's

    @property
    def label(self) -> str:
        """Its arguments in words."""
        values = [*self.arguments.values(), *self.backends]
        return " ".join(",".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in values)


# --- the plan ----------------------------------------------------------------------------------------------------


def plan(settings: Settings) -> list[Task]:
    """Everything, the important first: what is correct, the targets, memory, the rest."""
    return list(_quick(settings) if settings.quick else _full(settings))


def _check(op: str, backend: str, size: str, dtypes: Sequence[str], limit: float = 90.0) -> Task:
    arguments = {"op": op, "backend": backend, "size": size, "dtypes": tuple(dtypes)}
    return Task("checks", "check_op", arguments, limit)


def _checks(settings: Settings, *arguments: Any) -> Iterator[Task]:
    for backend in settings.backends:
        yield from (_check(op, backend, *arguments) for op in backends.OPS)


def _own_convolution(settings: Settings, sizes: dict[str, Sequence[str]]) -> Iterator[Task]:
    """Checks of a kernel that nothing calls by default: after the targets."""
    if "triton" in settings.backends:
        for size, dtypes in sizes.items():
            yield _check("conv_norm", gpu_speed.IMPLICIT_GEMM, size, dtypes)


def _attention(section: str, op: str, variant: str, shape: Sequence[int], dtype: str, *rivals: str) -> Task:
    arguments = {"op": op, "variant": variant, "shape": tuple(shape), "dtype": dtype, "rivals": rivals}
    return Task(section, "attention", arguments, 120.0 if "torch.compile" in rivals else 60.0)


def _peers(shape: Sequence[int], dtype: str) -> Iterator[Task]:
    """Each op that an installed package has, too, in a task of its own."""
    for op, variant in _installed():
        task = _attention("peers", op, variant, shape, dtype, "peer")
        # flash_bla tries 144 configurations of both its kernels for every N and dtype, float32 of its check too
        yield dataclasses.replace(task, limit=240.0) if variant == "elu" else task


def _models(model: str, dtype: str, batch: int, *modes: str, side: int = 32, limit: float = 90.0) -> Task:
    arguments = {"model": model, "dtype": dtype, "batch": batch, "modes": modes, "side": side}
    return Task("models", "models", arguments, limit)


def _compiled(settings: Settings, model: str, dtype: str, batch: int) -> Iterator[Task]:
    """Each compiled mode beside eager in a task of its own: one that takes too long costs nothing but itself."""
    for name in ("eager", *settings.backends[:1]):
        yield _models(model, dtype, batch, "eager", f"{name} + compile")


def _conv(settings: Settings, shape: Sequence[int], layout: str, dtype: str, compiled: bool) -> Task:
    arguments = {"shape": tuple(shape), "layout": layout, "dtype": dtype, "compiled": compiled}
    return Task("conv_norm", "convolution", arguments)


def _full(settings: Settings) -> Iterator[Task]:
    performer, linear, rivals = "performer_attention", "linear_attention", ("reference", "sdpa")
    fused = settings.backends
    yield Task("ceilings", "ceilings", {"dtype": HALF})
    yield from _checks(settings, "small", ("float16", "float32", "bfloat16"))
    yield _attention("attention", performer, "softmax", MAIN, HALF, *rivals, "torch.compile")
    yield _attention("attention", linear, "softmax", MAIN, HALF, *rivals, "torch.compile")
    yield _attention("attention", performer, "softmax", (8, 4, 16384, 32), HALF, *rivals)
    yield Task("gradients", "check_model", {"model": "cpv-5/4", "dtype": HALF, "batch": 8, "side": 32})
    yield _models("cpv-5/4", HALF, 256, "eager", *fused)
    yield from _compiled(settings, "cpv-5/4", HALF, 256)
    yield from _checks(settings, "models", (HALF,), 60.0)
    yield from _own_convolution(settings, {"small": (HALF, "float32", "bfloat16"), "models": (HALF,)})
    yield from (_conv(settings, (256, 128, 32, 32), layout, HALF, True) for layout in ("channels_last", "NCHW"))
    for mode in ("eager", *fused[:1], *(f"{name} + checkpoints" for name in fused[:1])):
        yield Task("largest_batch", "largest_batch", {"model": "cpv-5/4", "dtype": HALF, "mode": mode})
    for shape in gpu_speed.SHAPES[1:]:
        for op in (performer, linear):
            yield _attention("attention", op, "softmax", shape, HALF, *rivals)
    for backend in settings.backends:
        for op in backends.OPS:
            yield Task("graphs", "check_graph", {"op": op, "backend": backend, "dtype": HALF})
    for tokens in gpu_speed.SWEEP:
        for op in (performer, linear):
            yield _attention("sweep", op, "softmax", (8, 4, tokens, 32), HALF, "sdpa")
    yield from _checks(settings, "long", (HALF,), 60.0)
    yield from _checks(settings, "wide", (HALF, "float32"))
    for model in gpu_models.MODELS:
        for dtype in (HALF, "bfloat16", "float32"):
            if (model, dtype) != ("cpv-5/4", HALF):
                arguments = {"model": model, "dtype": dtype, "batch": 8, "side": 32}
                yield Task("gradients", "check_model", arguments)
    yield _models("cpv-5/4", "bfloat16", 256, "eager", *fused)
    for batch in (32, 1024):
        yield _models("cpv-5/4", HALF, batch, "eager", *fused, *(f"{name} + checkpoints" for name in fused[:1]))
    for model in gpu_models.MODELS[1:]:
        yield _models(model, HALF, 256, "eager", *fused)
    if "cuda" in settings.backends:
        yield Task("ptx", "", {}, 90.0)
    for dtype in ("bfloat16", "float32"):
        yield from (_attention("attention", op, "softmax", MAIN, dtype, *rivals) for op in (performer, linear))
    for op, variant in ((linear, "elu"), (linear, "relu"), (performer, "relu")):
        yield _attention("attention", op, variant, MAIN, HALF, "reference")
    for model in gpu_models.MODELS[1:]:
        yield from _compiled(settings, model, HALF, 256)
    yield from _peers(MAIN, HALF)
    yield Task("sanitizer", "", {}, 240.0)
    # what is left of every model × dtype × batch
    for model in gpu_models.MODELS[1:]:
        for mode in ("eager", *fused[:1], *(f"{name} + checkpoints" for name in fused[:1])):
            yield Task("largest_batch", "largest_batch", {"model": model, "dtype": HALF, "mode": mode})
    planned = {(model, HALF, 256) for model in gpu_models.MODELS} | {("cpv-5/4", "bfloat16", 256)}
    planned |= {("cpv-5/4", HALF, batch) for batch in (32, 1024)}
    for model, dtype, batch in itertools.product(gpu_models.MODELS, (HALF, "bfloat16"), (256, 32, 1024)):
        if (model, dtype, batch) not in planned:
            yield _models(model, dtype, batch, "eager", *fused)
    # and of what plain PyTorch gains by torch.compile, and of the peers
    for shape in ((8, 4, 16384, 32), *gpu_speed.SHAPES[1:]):
        for op in (performer, linear):
            yield _attention("attention", op, "softmax", shape, HALF, "reference", "torch.compile")
    for dtype, batch in itertools.product((HALF, "bfloat16"), (256, 32, 1024)):
        for model in gpu_models.MODELS:
            if (dtype, batch) != (HALF, 256):
                yield from _compiled(settings, model, dtype, batch)
    for dtype in ("bfloat16", "float32"):
        for op in (performer, linear):
            yield _attention("attention", op, "softmax", MAIN, dtype, "reference", "torch.compile")
        yield from _peers(MAIN, dtype)
    for shape in gpu_speed.SHAPES[1:]:
        yield from _peers(shape, HALF)


def _quick(settings: Settings) -> Iterator[Task]:
    """Every function at a size that a CPU can do, Triton's interpreter too."""
    half = "float32" if settings.device == "cpu" else HALF
    yield Task("ceilings", "ceilings", {"dtype": half})
    yield from _checks(settings, "tiny", (half,))
    if settings.device == "cuda":
        for backend in settings.backends:
            yield Task("graphs", "check_graph", {"op": "linear_attention", "backend": backend, "dtype": half})
    shape = (1, 2, 64, 16)
    yield _attention("attention", "performer_attention", "softmax", shape, half, "reference", "sdpa", "torch.compile")
    yield _attention("sweep", "linear_attention", "softmax", shape, half, "sdpa")
    yield from _peers(shape, half)
    yield from _own_convolution(settings, {"tiny": (half,)})
    yield _conv(settings, (1, 16, 8, 8), "channels_last", half, True)
    yield Task("gradients", "check_model", {"model": "cltv-1/4", "dtype": half, "batch": 1, "side": 8})
    fused = settings.backends[:1]
    modes = ("eager", *fused, *(f"{name} + checkpoints" for name in settings.backends[-1:]))
    modes += tuple(f"{name} + compile" for name in fused)
    yield _models("cltv-1/4", half, 1, *modes, side=8, limit=120.0)
    for mode in ("eager", *fused):
        arguments = {"model": "cltv-1/4", "dtype": half, "mode": mode, "side": 8}
        yield Task("largest_batch", "largest_batch", arguments)
    if settings.device == "cuda":
        yield Task("ptx", "", {}, 90.0)
        yield Task("sanitizer", "", {}, 120.0)


def _installed() -> list[tuple[str, str]]:
    """The ops and feature maps that an installed package has, too; Nyström attention has no GPU kernel to compare."""
    return [
        (op, variant)
        for (op, variant), (package, _) in peers.GPU_PEERS.items()
        if peers.version_of(package) and op != "nystrom_attention"
    ]


# --- in the worker -----------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[..., None]] = {
    "ceilings": gpu_speed.ceilings,
    "attention": gpu_speed.attention,
    "convolution": gpu_speed.convolution,
    "check_op": gpu_checks.check_op,
    "check_graph": gpu_checks.check_graph,
    "check_model": gpu_checks.check_model,
    "models": gpu_models.models,
    "largest_batch": gpu_models.largest_batch,
}


def start(settings: Settings) -> tuple[Callable[[dict[str, Any], Emit], None], Callable[[], None]]:
    """What the worker's process does first, and with each task."""
    warnings.filterwarnings("ignore", message=".*is served by the reference", category=UserWarning)
    cuda = settings.where.type == "cuda"
    if cuda:  # what the libraries allocate at their first call for good is nobody's peak
        for dtype in (torch.float16, torch.float32):
            x = torch.ones(64, 64, device=settings.where, dtype=dtype)
            torch.nn.functional.conv2d((x @ x)[None, None], x[None, None, :3, :3])
        del x
    else:
        torch.set_num_threads(1 if settings.quick else torch.get_num_threads())

    def alive() -> None:
        if cuda:
            torch.cuda.synchronize()

    def perform(task: dict[str, Any], emit: Emit) -> None:
        if task["function"] == "environment":
            emit(environment(settings.where, torch.float16) | gpu_facts(settings.where) | {"peers": peers.versions()})
            return
        only = {"backends": task["backends"] or settings.backends, "barred": frozenset(task["barred"])}
        mine = dataclasses.replace(settings, **only)
        try:
            FUNCTIONS[task["function"]](mine, emit, **task["arguments"])
        finally:
            torch.compiler.reset()
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()

    return perform, alive


# --- in programs of their own ------------------------------------------------------------------------------------


def ninja_folder() -> str | None:
    """Where ninja is: of the Python package's, PATH knows nothing unless its environment was activated."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    found = shutil.which("ninja") or shutil.which("ninja", path=BIN_DIR)
    return found and str(Path(found).parent)


class Programs:
    """What builds and watches: processes that this one only waits for.

    Args:
        log: where their output goes.
    """

    def __init__(self, settings: Settings, log: Path):
        self.settings, self.log = settings, log
        self.ptx = Path(tempfile.mkdtemp(prefix="cxv-ptx-"))  # the package with a CUDA library of compute_75 alone

    def run(
        self, commands: dict[str, tuple[list[str], dict[str, str]]], limit: float, grace: float = math.inf
    ) -> list[dict[str, Any]]:
        """Run them side by side, for at most ``limit`` seconds, and ``grace`` after the first has ended; a row each."""
        begin, rows = time.perf_counter(), []
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for name in commands}
            running = {
                name: subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), **extra},
                    stdout=files[name],
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for name, (command, extra) in commands.items()
            }
            for name, process in running.items():
                try:
                    code: int | None = process.wait(max(1.0, limit - (time.perf_counter() - begin)))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)  # its compilers, too: they would disturb what is timed
                    process.wait()
                    code = None
                if not rows:
                    limit = min(limit, time.perf_counter() - begin + grace)
                status = "ok" if code == 0 else "out of time" if code is None else "failed"
                wall = round(time.perf_counter() - begin, 1)
                files[name].seek(0)
                printed = files[name].read()
                with self.log.open("a") as log:
                    log.write(f"--- {name}: {status}\n{printed}\n")
                note = None if status == "ok" else printed[-1500:]
                rows.append({"program": name, "status": status, "exit_code": code, "wall_s": wall, "note": note})
        return rows

    def build(self, limit: float, sections: set[str]) -> list[dict[str, Any]]:
        """Build in place; meanwhile, for what these sections will need, fill Triton's cache and build the library that
        is PTX of the lowest alone: as far as they come, as all else needs what is built in place.

        By setup.py, not by pip: what is there is enough, and no environment refuses to be written to.
        """
        ninja = ninja_folder()
        path = os.pathsep.join(filter(None, (os.environ.get("PATH"), ninja)))
        threads = f"--threads 2 {os.environ.get('NVCC_APPEND_FLAGS', '')}"  # an architecture each
        capability = first_line("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") or ""
        archs = f"7.5+PTX;{capability}" if capability not in ("", "7.5") else "7.5+PTX"
        setup = [sys.executable, "setup.py", "build_ext"]
        extra = {"TORCH_CUDA_ARCH_LIST": archs, "NVCC_APPEND_FLAGS": threads.strip(), "PATH": path}
        commands = {"build": ([*setup, "--inplace"], extra)}
        if "ptx" in sections and "cuda" in self.settings.backends and shutil.which("nvcc"):
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / "cxv_kernels", self.ptx / "cxv_kernels", ignore=ignored)
            aside = [f"--build-lib={self.ptx}", f"--build-temp={self.ptx}/temp"]
            commands["PTX library"] = (["nice", *setup, *aside], {"TORCH_CUDA_ARCH_LIST": "7.5+PTX", "PATH": path})
        arch = capability.replace(".", "")
        if sections - {*PROGRAMS} and "triton" in self.settings.backends and arch in ("80", "90"):
            report = [sys.executable, str(ROOT / "benchmarks" / "compile_report.py"), "--arch", arch, "--ragged"]
            commands["Triton"] = (["nice", *report, "--json", str(self.log.parent / "compile_report.json")], {})
        rows = self.run(commands, limit, GRACE)
        if ninja is None:
            rows[0]["note"] = f"without ninja, which was not found: file after file\n{rows[0]['note'] or ''}".strip()
        return rows

    def ptx_checks(self, limit: float) -> list[dict[str, Any]]:
        """The CUDA backend's sm_75 code on this card: the driver compiles it from PTX, as the library has no other."""
        name = "library of compute_75"
        if not list(self.ptx.glob("cxv_kernels/_cuda*.so")):
            return [{"program": name, "status": "not built"}]
        environment = {"PYTHONPATH": f"{self.ptx}{os.pathsep}{ROOT}", "CUDA_CACHE_DISABLE": "1"}
        return self._checks("cuda", "small", {name: ([], environment)}, limit)

    def sanitizer(self, limit: float) -> list[dict[str, Any]]:
        """Small shapes under compute-sanitizer, where it is installed."""
        watcher = shutil.which("compute-sanitizer")
        if watcher is None:
            return [{"program": "compute-sanitizer", "status": "not installed"}]
        # Without PyTorch's cache of memory, which hides what is read beyond a tensor; and what PyTorch asks of the
        # driver in vain is not an error of a kernel.
        tools = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
        rows = []
        for tool, flags in tools.items():
            for backend in self.settings.backends:
                command = [watcher, "--tool", tool, *flags, "--error-exitcode", "9"]
                watched = {f"{tool} {backend}": (command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})}
                rows += self._checks(backend, "tiny", watched, limit / (len(tools) * len(self.settings.backends)))
        return rows

    def _checks(
        self, backend: str, size: str, ways: dict[str, tuple[list[str], dict[str, str]]], limit: float
    ) -> list[dict[str, Any]]:
        """gpu_checks.py by each of these ways, and what it found in them."""
        script = str(ROOT / "benchmarks" / "gpu_checks.py")
        flags = ["--device", self.settings.device, "--backend", backend, "--size", size, "--dtype", HALF]
        with tempfile.TemporaryDirectory() as folder:
            files = {way: Path(folder) / f"{i}.json" for i, way in enumerate(ways)}
            commands = {
                way: ([*before, sys.executable, script, *flags, "--json", str(files[way])], extra)
                for way, (before, extra) in ways.items()
            }
            rows = self.run(commands, limit)
            for row, file in zip(rows, files.values(), strict=True):
                row["checks"] = gpu_report.read(file).get("rows", [])
        return rows

    def close(self) -> None:
        """Remove what was built aside."""
        shutil.rmtree(self.ptx, ignore_errors=True)


# --- all of it ---------------------------------------------------------------------------------------------------


def barred(done: Sequence[dict[str, Any]], among: Sequence[str]) -> set[tuple[str, str, str]]:
    """(op, or of gradients the model, backend, dtype) of every check that failed or did not live to tell, if only one
    backend was in it, its own or all ``among`` which the run chose; not of what was not reached."""
    found = set()
    for task in done:
        if task["section"] not in gpu_report.JUDGED:
            continue
        wanted, what = task["arguments"], "model" if task["section"] == "gradients" else "op"
        if task["status"] in gpu_report.WRONG:
            names = [wanted["backend"]] if what == "op" else task["backends"] or among
            # what was only slow has said of some dtypes that they are right
            right = {row["dtype"] for row in task["rows"] if row["status"] == "ok" and task["status"] == "out of time"}
            dtypes = set(wanted.get("dtypes") or (wanted["dtype"],)) - right
            found |= {(wanted[what], *names, dtype) for dtype in dtypes if len(names) == 1}
        found |= {(row[what], row["backend"], row["dtype"]) for row in task["rows"] if row["status"] == "failed"}
    return found


def one_by_one(task: Task, status: str, settings: Settings) -> list[Task]:
    """The task again for each backend alone, if one may have brought it down for all; no model that was only slow,
    nor a peer, which would be as slow beside each."""
    together = task.section in ("attention", "sweep", "conv_norm", "models", "gradients", "peers") and not task.backends
    names = gpu_report.measured(task.arguments, settings.backends)
    slow = task.section in ("models", "peers") and status == "out of time"
    if status not in gpu_report.WRONG or slow or not together or len(names) < 2:
        return []
    arguments = task.arguments
    if status == "out of time" and "rivals" in arguments:  # torch.compile may be what took it, and would for each again
        arguments = arguments | {"rivals": tuple(name for name in arguments["rivals"] if name != "torch.compile")}
    elif status == "out of time" and "compiled" in arguments:
        arguments = arguments | {"compiled": False}
    return [dataclasses.replace(task, arguments=arguments, backends=(name,)) for name in names]


def unfinished(tasks: Sequence[Task], earlier: dict[str, Any], settings: Settings) -> Iterator[Task]:
    """Those of the tasks, and of what `one_by_one` makes of them, that came to no end in an earlier run.

    Nor did what would be served by a library that its build did not finish.
    """
    builds = [row for row in gpu_report.rows_of(earlier, "build") if row["program"] == "build"]
    unbuilt = {"not built"} if all(row["status"] == "ok" for row in builds) else {"not built", "not served"}
    for task in tasks:
        before = next((t for t in earlier["tasks"] if (t["section"], t["label"]) == (task.section, task.label)), None)
        ended = before and before["status"] in ("ok", *gpu_report.WRONG)
        if not ended or any(row.get("status") in unbuilt for row in before["rows"]):
            yield task
        else:
            yield from unfinished(one_by_one(task, before["status"], settings), earlier, settings)


def benchmark(settings: Settings, arguments: argparse.Namespace) -> int:
    """Run the plan, print as it goes, keep the JSON; 0, or 1 if a check failed."""
    begin, path = time.perf_counter(), arguments.out / "gpu_suite.json"
    results: dict[str, Any] = {"benchmark": "gpu_suite", "environment": {}, "wall_s": 0.0, "tasks": []}
    results |= gpu_report.read(arguments.resume) if arguments.resume else {}
    tasks = [task for task in plan(settings) if task.section in arguments.only]
    tasks = list(unfinished(tasks, results, settings))
    if arguments.build:
        tasks.insert(0, Task("build", "", {}, 280.0))
    anew = {(task.section, task.label) for task in tasks}
    results["tasks"] = [task for task in results["tasks"] if (task["section"], task["label"]) not in anew]
    results["settings"] = dataclasses.asdict(settings) | {"barred": sorted(barred(results["tasks"], settings.backends))}
    results["verdicts"] = []
    here = False  # whether the environment is this machine's
    programs, worker = Programs(settings, arguments.out / "gpu_suite.log"), Worker(start, settings)

    def keep(task: Task, outcome: Outcome, limit: float) -> None:
        about = {"label": task.label, "limit": round(limit, 1)}  # the one that it had
        results["tasks"].append(dataclasses.asdict(task) | about | outcome.to_json())
        wrong = barred(results["tasks"], settings.backends)
        results["settings"]["barred"] = sorted(wrong)
        gpu_report.withdraw(results, wrong)
        results["wall_s"] = round(time.perf_counter() - begin, 1)
        write_json(path, results)
        ended = {row.get("status", "ok") for row in outcome.rows if task.section in PROGRAMS}
        status = ", ".join(sorted(ended - {"ok"})) or outcome.status
        print(f"{results['wall_s']:6.0f} s  {task.section:14} {status:12} {task.label}", flush=True)

    def in_programs(task: Task, limit: float) -> Outcome:
        started = time.perf_counter()
        if task.section == "build":
            rows = programs.build(limit, {task.section for task in tasks})
        else:
            rows = {"ptx": programs.ptx_checks, "sanitizer": programs.sanitizer}[task.section](limit)
        return Outcome("ok", rows, wall_s=time.perf_counter() - started)

    try:
        while tasks:
            task = tasks.pop(0)
            left = max(0.0, arguments.budget - (time.perf_counter() - begin))
            limit = min(task.limit, left)
            if task.section != "build" and not here:
                facts, here = worker.run({"function": "environment"}, 120.0), True
                results["environment"] = (
                    facts.rows[0] if facts.rows else results["environment"] | {"error": facts.error}
                )
                print(gpu_report.headline(results), flush=True)
            if left < 5:
                outcome = Outcome("not measured")
            elif task.section in PROGRAMS:
                outcome = in_programs(task, limit)
            else:
                message = {name: getattr(task, name) for name in ("function", "arguments", "backends")}
                outcome = worker.run(message | {"barred": barred(results["tasks"], settings.backends)}, limit)
            late = "out of time" in (outcome.status, *(row.get("status") for row in outcome.rows))
            if late and limit < task.limit and task.section != "build":
                outcome.status = "not measured"  # by no fault of its own
            keep(task, outcome, limit)
            tasks[:0] = one_by_one(task, outcome.status, settings)
    finally:
        worker.close()
        programs.close()
    results["verdicts"] = gpu_report.verdicts(results)
    write_json(path, results)
    (arguments.out / "gpu_suite.md").write_text(gpu_report.markdown(results) + "\n")
    print(gpu_report.summary(results))
    print(f"{path}, {results['wall_s']:.0f} s")
    return 1 if gpu_report.failures(results) else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a bad value."""
    parser = Parser("gpu_suite", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script")
    parser.add_argument("--out", type=Path, help="folder of the JSON and the programs' log")
    parser.add_argument("--backend", choices=(*BACKENDS, "all"), default="all", help="all: those of the device")
    parser.add_argument("--only", type=some_of(SECTIONS), default=SECTIONS, help="sections, comma-separated")
    parser.add_argument("--budget", type=seconds, default=480.0, help="seconds of all of it")
    parser.add_argument("--no-build", dest="build", action="store_false", help="measure what is installed")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE.json",
        help="keep what an earlier run measured, do the rest, within a --budget of its own; FILE.json is its "
        "gpu_suite.json, brought along if this is another machine (on the same one --no-build leaves out the build)",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few repetitions: a test")
    parser.add_argument("--markdown", type=Path, metavar="FILE.json", help="measure nothing: print FILE's tables")
    arguments = parser.parse_args(argv)
    if arguments.markdown:
        arguments.results = parser.results("--markdown", arguments.markdown, "gpu_suite")
        return arguments
    if arguments.resume:
        parser.results("--resume", arguments.resume, "gpu_suite")
    if arguments.out is None:
        parser.error("the following arguments are required: --out")
    parser.check_shared(arguments)
    arguments.build = arguments.build and "build" in arguments.only
    here = {"cuda": ("triton", "cuda"), "cpu": ("triton", "cpp") if _triton.interpreting() else ("cpp",)}
    arguments.backends = here[arguments.device] if arguments.backend == "all" else (arguments.backend,)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the JSON; 0, or 1 if a check failed."""
    arguments = parse(argv)
    if arguments.markdown:
        print(gpu_report.markdown(arguments.results))
        return 0
    return benchmark(Settings(arguments.device, arguments.backends, arguments.quick), arguments)


if __name__ == "__main__":
    sys.exit(main())
