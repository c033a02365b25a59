"""``cxv models``: the models by name."""

import argparse

from ..models import create_model, list_models

HELP = "list the models"
DESCRIPTION = "The models and their parameter counts."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> None:
    print(f"{'model':24s} parameters (10 classes)")
    for name in list_models():
        try:
            parameters = f"{sum(p.numel() for p in create_model(name, num_classes=10).parameters()):10,d}"
        except ImportError as error:
            parameters = str(error).rpartition(": ")[2]
        print(f"{name:24s} {parameters}")
    print("the same families with other layers/heads: cpv-2/4, cltv-8/4, …")
