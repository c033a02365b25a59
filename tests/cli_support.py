"""Calls of the ``cxv`` command."""

from cxv.cli import main

TINY = ["--model", "cpv-1/2", "--embed-dim", "16", "--limit-train", "96", "--limit-test", "40"]
TINY += ["--batch-size", "32", "--threads", "1"]


def call(capsys, *args):
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def assert_error(result, *parts):
    code, _, err = result
    assert code == 2
    assert err.startswith("cxv: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
