"""Whether the installed Triton can interpret at all."""

from importlib.metadata import PackageNotFoundError, version


def _release(package: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version(package).split(".")[:2])
    except PackageNotFoundError:
        return (99,)


INTERPRETER_BROKEN = (
    "Triton before 3.7 interprets nothing with NumPy from 2.4 on"
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 4)
    else None
)
