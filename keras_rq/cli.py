"""The `keras-rq` command: a demonstration, and two of the package's five lines without Python.

A user's mistake ends in one sentence on stderr and exit code 2. A traceback means a bug.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_POLICY_HELP = (
    "quantize the model first: A<bits>W<bits>[-<block>|-channel|-tensor][-<N>:<M>], "
    "for example A4W1, A1W1-channel, W4"
)


class UserError(Exception):
    """Something the user can put right: the message says what."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: what follows the command's name; by default, those of the process.

    Returns:
        The exit code: 0, or 2 after a mistake in the arguments or the files they name.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"keras-rq {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-rq",
        description="Train Keras models that survive 1-bit arithmetic, and run them as integers.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train, quantize, export and run a small network")
    demo.add_argument("--out", type=Path, default=Path("keras_rq_demo"), help="folder to write to")
    demo.add_argument("--epochs", type=_positive, help="epochs of quantization-aware training")
    demo.add_argument("--quick", action="store_true", help="one seed and one epoch: a smoke test")
    demo.set_defaults(run=_demo)

    report = commands.add_parser("report", help="bits, size and error of a model, by layer")
    report.add_argument("model", type=Path, metavar="MODEL", help="a .keras file")
    report.add_argument("--policy", metavar="SPEC", help=_POLICY_HELP)
    report.add_argument("--json", action="store_true", help="print JSON instead of a table")
    report.set_defaults(run=_report)

    export = commands.add_parser("export", help="write a model for a runtime, verified first")
    export.add_argument("model", type=Path, metavar="MODEL", help="a .keras file")
    export.add_argument("out", type=Path, metavar="OUT", help="the file to write, e.g. m.tflite")
    export.add_argument("--policy", metavar="SPEC", help=_POLICY_HELP)
    export.set_defaults(run=_export)
    return parser


def _positive(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number above 0. Received: {text!r}")


def _demo(options: argparse.Namespace) -> None:
    try:
        from keras_rq import demo
    except ImportError as error:
        raise UserError(
            f"the demo needs `{error.name}`. Install what it needs with "
            "`pip install 'keras-rq[demo]'`, and TensorFlow to write .tflite files."
        ) from error
    with _mistakes(f"cannot write to {options.out}", OSError):
        options.out.mkdir(parents=True, exist_ok=True)
    with _mistakes("the demo cannot run here", ImportError):
        demo.run(options.out, epochs=options.epochs, quick=options.quick)


def _report(options: argparse.Namespace) -> None:
    import keras_rq as rq

    report = rq.report(_model(options))
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)


def _export(options: argparse.Namespace) -> None:
    import keras_rq as rq

    model = _model(options)
    with _mistakes(
        f"cannot export {options.model}", ValueError, NotImplementedError, ImportError, OSError
    ):
        rq.export(model, str(options.out))
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")


def _model(options: argparse.Namespace) -> Any:
    """The model the user named, quantized if they asked for a policy."""
    import keras

    import keras_rq as rq

    path: Path = options.model
    if not path.exists():
        raise UserError(f"there is no file {path}. Give the path of a saved .keras model.")
    if path.suffix != ".keras":
        raise UserError(f"expected a .keras file, written by `model.save`. Received: {path}")
    with _mistakes(f"cannot load {path}", ValueError, TypeError, OSError, KeyError):
        model = keras.saving.load_model(path)
    if options.policy is not None:
        with _mistakes(f"cannot apply --policy {options.policy}", ValueError):
            rq.quantize(model, rq.QuantizationPolicy(options.policy))
    return model


@contextlib.contextmanager
def _mistakes(doing: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns the exceptions that a wrong argument or file causes into a `UserError`."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{doing}. {error}") from error
