"""The command `jaxrl-post`: arguments in, one clear message out.

Everything heavy is imported by the command that needs it, so that help and version come at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrl_post import __version__
from jaxrl_post.cli import CommandError
from jaxrl_post.cli import compile as compile_command

USER_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        0 after success, 2 after a mistake of the user, 130 after Ctrl-C. Other errors are raised.
    """
    arguments = _parse(argv)
    debug = getattr(arguments, "debug", False)
    if not debug:
        # The storage layer warns of options that it sets itself, and prints what it raises as well.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        arguments.handler(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{arguments.command}: interrupted{arguments.interrupted}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has left; the rest of the output must not raise again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        if debug or not is_user_error(error):
            raise
        print(f"jaxrl-post {arguments.command}: {_message(error)}", file=sys.stderr)
        return USER_ERROR
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; `key=value` may also stand after options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    later = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(later) < len(rest) or (later and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if later:
        arguments.overrides = [*arguments.overrides, *later]
    return arguments


def is_user_error(error: BaseException) -> bool:
    """Whether an error tells the user what to change, so that a traceback would only hide it.

    These are the errors of this library, which raises ValueErrors for wrong input, packages that are not
    installed, and all that the operating system refuses: files that are missing or closed, a disk that is full.
    """
    if isinstance(error, OSError | CommandError):
        return True
    # An ImportError of ours names the extra to install; a module that Python itself misses is a broken installation.
    if not isinstance(error, ValueError) and type(error) is not ImportError:
        return False
    if type(error).__module__.split(".")[0] == "jaxrl_post":
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").split(".")[0] == "jaxrl_post"


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")
    parser = argparse.ArgumentParser(
        prog="jaxrl-post", description="Post-training of language models in JAX.", parents=[debug]
    )
    parser.set_defaults(interrupted="")
    parser.add_argument("--version", action="version", version=f"jaxrl-post {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, handler: Any, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", parents=[debug])
        made.set_defaults(handler=handler)
        return made

    train = command("train", _train, "train as a configuration says, or resume the run in its run_dir")
    train.add_argument("config", metavar="CONFIG", help="YAML file; `jaxrl-post config` lists its keys")
    train.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="e.g. training.steps=100 rollout.group_size=16"
    )
    train.add_argument(
        "--executables", metavar="DIR", help="programs that compile --save has written, in the place of compiling them"
    )
    train.set_defaults(interrupted="; the same command resumes the run from its last checkpoint")

    generate = command("generate", _generate, "complete prompts with the model of a run")
    generate.add_argument("run_dir", metavar="RUN_DIR", help="directory of the run")
    generate.add_argument(
        "prompts", nargs="+", metavar="PROMPT", help="text to complete (after -- if it begins with a dash)"
    )
    generate.add_argument("--samples", type=_count, default=1, metavar="N", help="completions per prompt (1)")
    generate.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="divides the logits; 0 is greedy (0)"
    )
    generate.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether prompts are a user's messages, for the chat template (as the run was trained)",
    )
    generate.add_argument("--seed", type=_seed, default=0, metavar="S", help="seed of the sampling, below 2**32 (0)")
    generate.add_argument(
        "--max-new-tokens", type=_count, default=None, metavar="N", help="longest completion (as in training)"
    )

    evaluate = command("evaluate", _evaluate, "measure the model of a run on its held-out problems")
    evaluate.add_argument("run_dir", metavar="RUN_DIR", help="directory of the run")
    evaluate.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="how to measure, e.g. data.eval_files=[other.jsonl]",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    convert = command("convert", _convert, "a run or an Orbax checkpoint to a Hugging Face one, or that to Orbax")
    convert.add_argument("source", metavar="SRC", help="directory of a run or a model, or a hub id")
    convert.add_argument("target", metavar="DST", help="directory to write")
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the parameters (as they are)")

    compiled = command("compile", _compile, "compile a run for TPUs that are not here: does it fit, how fast is it")
    compile_command.add_arguments(compiled, _count)

    plot = command("plot", _plot, "draw the curves of one or several runs")
    plot.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="directories of runs")
    plot.add_argument(
        "--output",
        metavar="FILE",
        help="the picture (curves.png in the run's directory, comparison.png in the first)",
    )

    methods = command("methods", _methods, "list the methods, or show one: methods show mc-grpo")
    methods.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="WORD",
        help="only those whose record holds every word; `show ID` prints one",
    )
    methods.add_argument("--family", metavar="NAME", help="only those of a family")
    methods.add_argument("--json", action="store_true", help="print one JSON array of records")

    config = command("config", _config, "explain every key of a configuration")
    config.add_argument("--defaults", action="store_true", help="print a YAML file of all defaults instead")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2**32, got {text}")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def _train(arguments: argparse.Namespace) -> None:
    from jaxrl_post.training import config as configs

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", configs.ConfigWarning)
        config = configs.load(arguments.config, arguments.overrides)
    for warning in caught:
        if issubclass(warning.category, configs.ConfigWarning):
            print(f"warning: {warning.message}", file=sys.stderr)
    from jaxrl_post.training import distributed, loop

    def report(error: Exception) -> int:
        if getattr(arguments, "debug", False) or not is_user_error(error):
            traceback.print_exception(error)
            return 1
        print(f"jaxrl-post train: {_message(error)}", file=sys.stderr)
        return USER_ERROR

    with distributed.session(report):
        loop.run(config, executables=arguments.executables)


def _generate(arguments: argparse.Namespace) -> None:
    _require_run(arguments.run_dir)
    from jaxrl_post.training import inference

    results = inference.generate_text(
        arguments.run_dir,
        arguments.prompts,
        samples=arguments.samples,
        temperature=arguments.temperature,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        chat=arguments.chat,
    )
    if arguments.samples > 1 and arguments.temperature == 0:
        print("completions at temperature 0 are all the same; give --temperature", file=sys.stderr)
    for prompt, completions in zip(arguments.prompts, results, strict=True):
        for completion in completions:
            print(f"{prompt}{completion['text']}")
            print(
                f"    log-probability {completion['logp']:.4f} nats, ended by {completion['finish']}", file=sys.stderr
            )


def _evaluate(arguments: argparse.Namespace) -> None:
    _require_run(arguments.run_dir)
    from jaxrl_post.training import config as configs

    configs.check_evaluation_overrides(arguments.overrides)
    from jaxrl_post.training import inference

    results = inference.evaluate_run(arguments.run_dir, arguments.overrides)
    if arguments.json:
        print(json.dumps({name: _finite(results[name]) for name in sorted(results)}))
        return
    width = max(map(len, results), default=0)
    for name, value in results.items():
        digits = 0 if float(value).is_integer() else 4
        print(f"{name:<{width}}  {value:.{digits}f}")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value


def _convert(arguments: argparse.Namespace) -> None:
    from jaxrl_post.training.convert import convert

    print(convert(arguments.source, arguments.target, dtype=arguments.dtype))


def _compile(arguments: argparse.Namespace) -> None:
    compile_command.run(arguments)


def _plot(arguments: argparse.Namespace) -> None:
    from jaxrl_post.training.plot import plot

    print(plot(arguments.run_dirs, arguments.output))


def _methods(arguments: argparse.Namespace) -> None:
    from jaxrl_post.methods import records

    words = arguments.words
    if words[:1] == ["show"]:
        if len(words) != 2:
            raise CommandError("show takes one id, as in `jaxrl-post methods show mc-grpo`")
        known = {record.method: record for record in reversed(records.catalog()) if record.method is not None}
        known |= {record.id: record for record in records.catalog()}
        if words[1] not in known:
            if not arguments.json and (described := records.without_record(words[1])):
                print(described)
                return
            near = difflib.get_close_matches(words[1], known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`jaxrl-post methods` lists them"
            raise CommandError(f"there is no method {words[1]!r}; {hint}")
        chosen = known[words[1]]
        if arguments.json:
            print(json.dumps(dataclasses.asdict(chosen)))
        else:
            print(records.describe(chosen))
        return
    families = sorted({record.family for record in records.catalog()})
    if arguments.family is not None and arguments.family not in families:
        raise CommandError(f"there is no family {arguments.family!r}; there are {', '.join(families)}")
    found = records.search(words, arguments.family)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(record) for record in found]))
        return
    width = max((len(record.id) for record in found), default=0)
    for family in families:
        members = [record for record in found if record.family == family]
        if members:
            print(f"{family} ({len(members)})")
        for record in members:
            print(f"  {record.id:<{width}}  {record.summary or record.title}")
    others = records.unrecorded(words) if arguments.family is None else {}
    if others:
        print(f"without a record of its own ({len(others)})")
    for name, summary in others.items():
        print(f"  {name:<{width}}  {summary}")
    if not found and not others:
        raise CommandError(f"no method's record holds {' and '.join(map(repr, words))}")


def _config(arguments: argparse.Namespace) -> None:
    from jaxrl_post.training import config as configs

    print(configs.defaults() if arguments.defaults else configs.document(), end="")


def _require_run(run_dir: str) -> None:
    # Before the slow imports, and in the words of somebody who mistyped a directory.
    if "://" not in run_dir and not (Path(run_dir) / "config.yaml").is_file():
        raise FileNotFoundError(f"{run_dir} is not the directory of a run: it holds no config.yaml")


if __name__ == "__main__":
    sys.exit(main())
