"""What a terminal does to the command: encodings, closed pipes, Ctrl-C, long errors, two processes at once."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cli_support import TINY, assert_error, call
from filelock import FileLock
from PIL import Image

import cxv
from cxv.cli import train as train_command
from cxv.data import progress as progress_module
from cxv.data.progress import Progress
from cxv.errors import InputError, listed, printable
from cxv.training import interrupt
from cxv.training.logging import epoch_line, plot_curves, plot_text

ENV = {**os.environ, "PYTHONPATH": str(Path(cxv.__file__).parent.parent)}
# the process around main, without the time that PyTorch takes
COMMAND = """
import sys, types
sys.modules["cxv.cli"] = cli = types.ModuleType("cxv.cli")
def main():
    {body}
cli.main = main
from cxv.__main__ import run
sys.exit(run())
"""


def process(body, *redirections, **env):
    """Run ``main`` with this body as the command is run, in a shell."""
    line = ["sh", "-c", f'"$0" -c "$1" {" ".join(redirections)}', sys.executable, COMMAND.format(body=body)]
    done = subprocess.run(line, env=ENV | env, capture_output=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "3×8 … 中 \\udcff\n".encode()),
        ("latin-1", "3×8 ... \\u4e2d \\udcff\n".encode("latin-1")),
        ("ascii", b"3x8 ... \\u4e2d \\udcff\n"),
    ],
)
def test_every_encoding_takes_every_character(encoding, expected):
    """A file name that is not UTF-8 has a lone surrogate."""
    body = r"print('3×8 … 中 \udcff'); print('3×8 … 中 \udcff', file=sys.stderr)"
    assert process(body, PYTHONIOENCODING=encoding) == (0, expected, expected)


@pytest.mark.parametrize("body", ["[print(i, flush=True) for i in range(10**6)]", "print(' ' * 10**6); sys.exit(0)"])
def test_a_closed_pipe_ends_the_command(body):
    assert process(body, "| head -c 1 > /dev/null") == (0, b"", b"")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", COMMAND.format(body=body)]
    done = subprocess.run(command, env=ENV, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_named():
    code, _, err = process("print('a')", "> /dev/full")
    assert (code, err) == (2, b"cxv: error: cannot write the output: No space left on device\n")


def test_closed_streams_do_no_harm():
    assert process("print('a'); print('b', file=sys.stderr); sys.stderr.isatty()", ">&- 2>&-") == (0, b"", b"")


def test_an_unknown_user_without_a_home_in_an_ascii_locale(tmp_path):
    """As in a container that is started with ``--user 12345``."""
    code = """
import os, pwd, sys
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
from cxv.__main__ import run
sys.exit(run())
"""
    env = {name: value for name, value in ENV.items() if name not in ("HOME", "CXV_CACHE", "XDG_CACHE_HOME")}
    env |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / split / name / "é.png")
    args = "train --model cpv-1/2 --embed-dim 16 --data images --epochs 1 --sgd-epochs 0 --output run"
    command = [sys.executable, "-c", code, *args.split()]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"2 training and 2 test images, 2 classes, 3x8x8" in done.stdout
    assert b"Traceback" not in done.stderr


def test_ctrl_c_while_pytorch_is_imported():
    code = """
import sys, time
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Finder())
sys.argv = ["cxv", "models"]
from cxv.__main__ import run
sys.exit(run())
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"importing\n"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, b"cxv: interrupted\n")


def test_ctrl_c_twice_ends_without_a_traceback():
    body = "import os, signal; raise KeyboardInterrupt"
    assert process(body) == (130, b"", b"")


class Stderr:
    """Notes when something is written."""

    def __init__(self):
        self.text, self.times = "", []

    def write(self, text):
        self.text += text
        self.times.append(time.monotonic())

    def flush(self):
        pass


def test_ctrl_c_is_answered_before_a_long_call_ends(monkeypatch):
    """Python calls its handlers after a backward pass; the stand-in for one is a call that gives up the GIL."""
    stderr = Stderr()
    monkeypatch.setattr(sys, "stderr", stderr)
    ends = []

    def work():
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with interrupt.deferred_interrupts():
            hashlib.pbkdf2_hmac("sha256", b"", b"", 5_000_000)
            ends.append(time.monotonic())

    with pytest.raises(interrupt.Interrupted):
        work()
    assert "stopping after this batch" in stderr.text
    assert stderr.times[0] < ends[0] - 0.2
    assert signal.set_wakeup_fd(-1) == -1


def test_two_runs_do_not_share_a_directory(capsys, tmp_path):
    output = tmp_path / "a"
    args = ["train", *TINY, "--epochs", 1, "--sgd-epochs", 0]
    output.mkdir()
    for flags in ([], ["--overwrite"]):
        with FileLock(output / ".lock"):
            assert_error(call(capsys, *args, *flags, "--output", output), "--output: another process is training in")
    assert call(capsys, *args, "--output", output)[0] == 0
    with FileLock(output / ".lock"):
        assert_error(call(capsys, "train", "--resume", output), "another process is training in")
    assert call(capsys, "train", "--resume", output)[0] == 0


def test_resume_takes_the_directory(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "train", *TINY, "--epochs", 1, "--sgd-epochs", 0, "--output", "a")[0] == 0
    code, out, _ = call(capsys, "train", "--resume", "a", "--epochs", 2)
    assert code == 0
    assert "resumed after epoch 1" in out
    assert_error(call(capsys, "train", "--resume", "a", "--output", "b"), "--resume a and --output b", "give one")
    assert_error(call(capsys, "train", "--resume", "c"), "c holds no run")


def test_stored_paths_are_valid_in_every_directory(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for name, color in (("dark", 0), ("light", 255)):
            Path("images", split, name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (color, color, i)).save(Path("images", split, name, f"{i}.png"))
    args = ["--model", "cpv-1/2", "--embed-dim", 16, "--threads", 1, "--epochs", 1, "--sgd-epochs", 0]
    data = ["--data", "folder", "--data-dir", "images"]
    assert call(capsys, "train", *args, *data, "--output", "run")[0] == 0
    stored = json.loads(Path("run", "args.json").read_text())
    assert (stored["data_dir"], stored["output"]) == (str(tmp_path / "images"), str(tmp_path / "run"))
    assert stored["cache_dir"] is None
    assert call(capsys, "train", *args, *data, "--output", "b", "--init", "run")[0] == 0
    assert call(capsys, "train", "--resume", "b", "--init", "run")[0] == 0  # the same file as at first
    monkeypatch.chdir("/")
    assert call(capsys, "eval", "--checkpoint", tmp_path / "run")[0] == 0


def test_the_speed_in_a_log_is_that_of_this_process(capsys, monkeypatch):
    clock = iter([0.0, 40.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    with Progress(1000, "epoch 3", done=600) as progress:
        progress.update(80, loss="1.5")
    assert capsys.readouterr().err == "epoch 3: 680/1000 images, 2/s  loss 1.5\n"


@pytest.mark.parametrize("split", ["test", "validation"])
def test_epoch_lines_fit_100_columns(split):
    row = {"epoch": 300, "phase": "adamw", "augmented": True, "lr": 1.2345e-5, "img_size": 224, "skipped_steps": 123}
    row |= {"train_loss": 2.34567, "train_top1": 100.0, f"{split}_loss": 2.34567, f"{split}_top1": 100.0}
    lines = epoch_line(row | {"images_per_second": 12345.6, "seconds": 12345.6}, best=True).splitlines()
    assert max(map(len, lines)) <= 100
    assert all(part in lines[0] for part in ("epoch 300", "224px", "train loss 2.346 100.0 %", "100.00 %", "best"))
    assert "123 steps skipped" in lines[1]


def test_unknown_options_point_to_the_help_of_the_command(capsys):
    assert_error(call(capsys, "train", "--epoch-size", 3), "--epoch-size", "(see cxv train --help)")
    assert_error(
        call(capsys, "eval", "--checkpoint", "a", "--dta-dir", "b"), "did you mean --data-dir?", "cxv eval --help"
    )
    assert_error(call(capsys, "--fast", "models"), "--fast")


def test_long_errors_are_shortened(capsys, monkeypatch):
    def fail(config, log):
        raise InputError("`data`: a\nb" + 5000 * "x")

    monkeypatch.setattr(train_command, "train", fail)
    result = call(capsys, "train")
    assert_error(result, "--data: a\\nb", "xxx … and 4012 more characters")
    assert len(result[2]) < 1100
    assert listed([f"c{i}" for i in range(200)]).endswith("c8, c9, … and 190 more")
    assert listed(["a", "b\n"]) == "a, b\\n"
    assert printable("a b\tä中\udcff") == "a b\\tä中\\udcff"


def test_errors_of_the_system_are_one_line(capsys):
    assert_error(call(capsys, "eval", "--checkpoint", 5000 * "a"), "aaa")


def test_plots_show_every_name(recwarn):
    """Neither as a formula, nor with boxes for what the font lacks."""
    row = {"epoch": 1, "phase": "adamw", "lr": 1, "train_loss": 1, "train_top1": 1, "test_loss": 1, "test_top1": 1}
    assert plot_curves([row], r"$\bad{ and $x_2^ 中 \n" + "\udcff\n")[:4] == b"\x89PNG"
    assert not recwarn.list
    assert plot_text("a_$5\n中ä") == "a_\\$5\\n\\u4e2dä"
