"""The command line ``qwen-jax``: a thin function per subcommand, which imports what it needs itself.

Results go to stdout, progress and logs to stderr. A user's mistake is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from qwen_jax.cli_cluster import add_cluster
from qwen_jax.cli_evaluation import add_calibrate, add_eval
from qwen_jax.cli_models import add_compile, add_convert, add_export, add_info, add_plan
from qwen_jax.cli_options import add_command, add_model, add_options
from qwen_jax.cli_serving import add_bench, add_run_batch, add_serve
from qwen_jax.cli_tune import add_tune
from qwen_jax.errors import UserError
from qwen_jax.serving.options import EngineOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``qwen-jax`` with these arguments (default: the process's) and return the exit code."""
    args = _parser().parse_args(argv)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not the user's business
    try:
        code = args.run(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"qwen-jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe went away: say nothing, also at interpreter exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code or 0


def _generate(args: argparse.Namespace) -> None:
    params = _sampling(args)
    engine = _engine(args)
    if args.json:
        output = engine.generate(args.prompt, params)[0]
        names = ("text", "token_ids", "finish_reason", "schedule")
        print(json.dumps({name: getattr(output, name) for name in names}))
        return
    for delta in engine.stream(args.prompt, params):
        print(delta.text, end="", flush=True)
    print()


def _chat(args: argparse.Namespace) -> None:
    params = _sampling(args)
    engine = _engine(args)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        answer = ""
        for delta in engine.stream(messages, params):
            answer += delta.text
            print(delta.text, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})


def _sampling(args: argparse.Namespace) -> Any:
    """Return the `SamplingParams` that the arguments ask for; for use before a slow load, since it checks values."""
    from qwen_jax.engine.api.sampling_params import SamplingParams

    return SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)


def _engine(args: argparse.Namespace) -> Any:
    from qwen_jax.engine.engine import Engine

    return Engine.from_pretrained(args.model, dtype=args.dtype, max_batch_size=1, max_seq_len=args.max_seq_len,
                                  progress=sys.stderr.isatty() or not getattr(args, "json", False))


def _train(args: argparse.Namespace) -> None:
    from qwen_jax.training.finetune import train
    from qwen_jax.training.recipe import load_recipe

    print(train(load_recipe(args.recipe)))


def _add_generate(commands: Any) -> None:
    parser = add_command(commands, "generate", _generate, "Continue a prompt.")
    add_model(parser)
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    _add_sampling(parser)


def _add_chat(commands: Any) -> None:
    parser = add_command(commands, "chat", _chat, "Talk to a model: one line per turn, Ctrl-D ends.")
    add_model(parser)
    parser.add_argument("--system", help="system message")
    _add_sampling(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer (default: 256)")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 for greedy (default: the checkpoint's)")
    parser.add_argument("--top-p", type=float, metavar="X", help="share of probability to draw from (default: the "
                        "checkpoint's)")
    parser.add_argument("--seed", type=int, help="seed of the draws (default: a random one)")
    add_options(parser, EngineOptions, ("dtype", "weights", "max_seq_len"))


def _add_train(commands: Any) -> None:
    parser = add_command(commands, "train", _train, "Fine-tune a model, or train a LoRA adapter, as a TOML recipe "
                         "says. Run again, it continues where it was interrupted.")
    parser.add_argument("recipe", metavar="RECIPE.toml")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qwen-jax", description="Qwen2.5 in JAX. MODEL is a Hugging Face folder, a "
                                     "converted checkpoint, a hub id, 'bundled' or 'yardstick'.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_convert, add_export, _add_generate, _add_chat, add_serve, add_run_batch, add_bench, add_tune,
                add_cluster, add_eval, add_calibrate, _add_train, add_info, add_compile, add_plan):
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
