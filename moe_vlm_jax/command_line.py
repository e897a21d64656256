"""What the command lines share: the --config flag with clear errors, and the compilation cache.

    --config configs/sft.py:tiny --config.optimizer.learning_rate=1e-4 --config.data.row_lengths="(256, 512)"

The file's get_config(arg) gives a RunConfig (or what else the command takes: a Chain, ...), overrides set its fields,
and `validate` checks the result. All of that happens before anything else; what is wrong is said in one message,
without a traceback.
"""

import contextlib
import functools
import logging as std_logging
import os
import pathlib
import re
import runpy
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from moe_vlm_jax import chain, validation
from moe_vlm_jax import config as config_lib

_OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<field>[^=]*)(=(?P<value>.*))?", re.DOTALL)


def define_config(default: str) -> flags.FlagHolder[Any]:
    """Defines --config and its overrides; `.value` is the validated RunConfig, or Chain where `run` allows it."""
    return config_flags.DEFINE_config_file("config", default, "FILE.py[:ARGUMENT] with get_config(ARGUMENT).")


def config_name() -> str:
    """Returns the name of the chosen config: 'sft' for configs/sft.py, 'sft-phi2-4e' for configs/sft.py:phi2-4e."""
    path, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return "-".join(filter(None, (pathlib.Path(path).stem, argument)))


def run(
    main: Callable[[Sequence[str]], None],
    *,
    chains: bool = False,
    kind: type = config_lib.RunConfig,
    validate: Callable[[Any], None] = chain.validate,
) -> None:
    """Parses the command line and calls main; a mistake in it ends the process with code 2.

    Args:
      main: called with the arguments that are no flags.
      chains: whether --config may give a Chain.
      kind: of config that --config gives, a dataclass.
      validate: raises ValueError for what is wrong with one.
    """
    app.run(main, flags_parser=functools.partial(_parse, chains=chains, kind=kind, validate=validate))


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Ends the process with code 2 and the message alone when something inside says that the user is mistaken."""
    try:
        yield
    except ValueError as error:
        if logging.get_verbosity() >= logging.DEBUG:
            raise
        sys.stderr.write(f"error: {error}\n(--verbosity=1 shows where this was found)\n")
        sys.exit(2)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache, so a second start compiles in seconds.

    JAX's own JAX_COMPILATION_CACHE_DIR moves it; the programs depend on shapes and settings, not on a run.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "moe_vlm_jax" / "compiled"))


def show_messages() -> None:
    """Shows our messages with the time of day, and of other packages only warnings: Orbax tells every rename."""
    if not flags.FLAGS.is_parsed():  # by argparse, which absl does not know of
        flags.FLAGS.mark_as_parsed()
    logging.use_absl_handler()
    if flags.FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(std_logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    ours = str(pathlib.Path(__file__).parent)
    handler.addFilter(lambda record: record.levelno > std_logging.INFO or record.pathname.startswith(ours))


def _parse(argv: Sequence[str], *, chains: bool, kind: type, validate: Callable[[Any], None]) -> list[str]:
    default = kind()
    try:
        default = _check_overrides(argv, kind)
        rest = flags.FLAGS(argv)
        config = flags.FLAGS["config"].value
        if isinstance(config, config_lib.Chain) and not chains:
            raise ValueError(
                f"--config gives a chain of {', '.join(chain.runs(config))}, and this command takes one run; give the "
                "config of that run, e.g. configs/stage3.py."
            )
        validate(config)
    except (flags.Error, ValueError) as error:
        sys.stderr.write(f"error: {_explain(error, argv, default)}\n")
        sys.exit(2)
    if len(rest) > 1:
        sys.stderr.write(
            f"error: unexpected argument(s) {' '.join(rest[1:])}; write overrides as --config.a.b=value.\n"
        )
        sys.exit(2)
    show_messages()
    return rest


def _check_overrides(argv: Sequence[str], kind: type) -> Any:
    """Returns the config as its file makes it, or kind() where that fails: the parser then says why.

    Raises:
      ValueError: a config file that is not there, or overrides of fields that do not exist.
    """
    mistakes = []
    name = str(flags.FLAGS["config"].default)
    for i, argument in enumerate(argv[1:], start=1):
        named = re.fullmatch(r"--?config(=(?P<path>.*))?", argument)
        if named:
            name = named["path"] if named["path"] is not None else "".join(argv[i + 1 : i + 2])
            path = name.partition(":")[0]
            if not pathlib.Path(path).is_file():
                mistakes.append(f"config file {path!r} does not exist; give the path of a file like configs/sft.py.")
    config = kind() if mistakes else _made(name, kind)
    fields = validation.flatten(config)
    for argument in argv[1:]:
        match = _OVERRIDE.fullmatch(argument)
        if match and match["field"] not in fields:
            mistakes.append(validation.unknown_field(match["field"], config))
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return config


def _made(name: str, kind: type) -> Any:
    path, _, argument = name.partition(":")
    try:
        config = runpy.run_path(path)["get_config"](*filter(None, [argument]))
    except Exception:  # a config file is the user's code and may raise anything; the parser runs it again and says what
        return kind()
    if not isinstance(config, (kind, config_lib.Chain)):
        raise ValueError(f"get_config() of --config must return {kind.__name__}, not {type(config).__name__}.")
    return config


def _explain(error: Exception, argv: Sequence[str], config: Any) -> str:
    """Returns the message for people: absl's names the parser's trouble, not the field's type."""
    fields = validation.flatten(config)
    text = str(error)
    for argument in argv:
        match = _OVERRIDE.fullmatch(argument)
        if match is None or f"config.{match['field']}" not in text:
            continue
        default = fields.get(match["field"])
        example = f'"{default}"' if isinstance(default, tuple) else default
        given = match["value"] if match["value"] is not None else "(the next argument)"
        return (
            f"config field {match['field']!r} must be of type {type(default).__name__}, not {given!r}; write it like "
            f"--config.{match['field']}={example}."
        )
    if "Error whilst parsing config file" in text:  # a traceback; its last line is what get_config() said
        return typing.cast(str, [line for line in text.splitlines() if line.strip()][-1]).partition(": ")[2]
    return text
