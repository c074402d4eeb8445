"""What does each launch of a captured decode step add?

    python3 benchmarks/step_launches.py --scheme quip-e8p-2bit --batch 1 16

Captures the step of a random model of a --shape, and profiles replays. A launch adds the time from
the end of whatever ended before it to its own end: what it costs in a chain of dependent launches.
The table has the median over blocks and replays, and what lies before the first block and after
the last.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from aqlm_infer.bench.shapes import random_model, shape_config
from aqlm_infer.generation import prepare_for_generation

BLOCK, LAST = ("_attend", "step_attention_kernel"), "_choose"
"""Launches one of which is there once a block, and at the end of a step."""

REPLAYS = 5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="only this many blocks")
    parser.add_argument("--scheme", nargs="+", default=["quip-e8p-2bit"])
    parser.add_argument("--precision", default="exact")
    parser.add_argument("--lm-head", help="scheme of a quantized head")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--prompt-tokens", type=int, default=192)
    return parser.parse_args()


def short(name: str) -> str:
    """A kernel's name without types, arguments and numbers of its compilation."""
    name = re.sub(r"^void |aqlm::|\(anonymous namespace\)::|\(.*$", "", name)
    return re.sub(r"<.*$", "", name)[:44]


def replays(replay) -> list[list[tuple[str, float]]]:
    """For each replay (name, microseconds that it adds) of its launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(REPLAYS + 1):
            replay()
        torch.cuda.synchronize()
    events = [e for e in recorded.events() if e.device_type == DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.end)
    steps, step, before = [], [], None
    for event in events:
        end = event.time_range.end
        step.append((short(event.name), 0.0 if before is None else end - before))
        before = end
        if LAST in event.name:
            steps.append(step)
            step = []
    return steps[1:]


def table(steps: list[list[tuple[str, float]]]) -> Iterator[str]:
    """Lines of medians: a block's launches, then the rest."""
    names = [name for name, _ in steps[0]]
    same = [step for step in steps if [name for name, _ in step] == names]
    adds = [statistics.median(step[i][1] for step in same) for i in range(len(names))]
    starts = [i for i, name in enumerate(names) if name in BLOCK]
    size = starts[2] - starts[1]
    inner = range(1, len(starts) - 1)
    for j in range(size):
        value = statistics.median(adds[starts[b] + j] for b in inner)
        yield f"  {value:7.2f}  {names[starts[1] + j]}"
    block = statistics.median(sum(adds[starts[b] : starts[b] + size]) for b in inner)
    yield f"  {block:7.2f}  a block; {len(names)} launches, {len(same)} replays"
    end = starts[-1] + size
    for place, part in (("before", range(starts[0])), ("after", range(end - 2, len(names)))):
        for i in part:
            yield f"  {adds[i]:7.2f}  {names[i]} ({place} the blocks)"


def step_us(replay) -> float:
    """Microseconds of a replay, run after run."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    replay()
    start.record()
    for _ in range(20):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / 20


@torch.no_grad()
def main() -> None:
    given = arguments()
    for scheme in given.scheme:
        config = shape_config(given.shape, given.layers)
        model = random_model(config, scheme, torch.float16, "cuda", precision=given.precision)
        prepare_for_generation(model, lm_head=given.lm_head)
        for batch in given.batch:
            prompt = torch.randint(0, config.vocab_size, (batch, given.prompt_tokens)).cuda()
            model.generate(prompt, do_sample=False, max_new_tokens=64, pad_token_id=0)
            replay = model.forward.runner.rehearsal()
            print(f"{scheme} {given.precision} B={batch}: {step_us(replay):.0f} us", flush=True)
            for line in table(replays(replay)):
                print(line, flush=True)
        del model, replay
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
