"""The course's own notebook, run: what its teacher returns, and what its stored outputs say.

python study/notebook.py FILE       FILE is "1.离线学习.ipynb" of the course's repository

The notebook's cells are executed as they are in FILE, up to the teacher's training, once for each
seed of 0 to 9; nothing of them is kept. A line for each goes to results/cells.jsonl: the loop's own
tests (means of ten episodes) and 100 episodes after it, from the starts that the program's teacher
of that seed has. Another line has the outputs that FILE stores. One thread; two minutes a seed.
"""
import argparse
import contextlib
import io
import json
import pathlib
import random
import re
import sys
import time
import types

import gym
import numpy as np
import torch

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import measure  # noqa: E402
import run  # noqa: E402

SEEDS = range(10)


def code_cells(path):
    """The notebook's code cells, with their sources and printed outputs: a list of (text, text)."""
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            printed = ["".join(output.get("text", [])) for output in cell["outputs"]]
            found.append(("".join(cell["source"]), "".join(printed)))
    return found


def tests_of(printed):
    """The lines "epoch return" or "update return" of a loop's output: a list of [step, return]."""
    return [[int(step), float(value)]
            for step, value in re.findall(r"(?m)^(\d+) (-\d+\.\d+)$", printed)]


def train(cells, seed):
    """Execute the cells in a namespace of their own: the loop's tests, [step, return], and the
    returns of 100 episodes of the teacher after it."""
    torch.manual_seed(seed)
    random.seed(seed)
    world = {"__name__": "notebook"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for k, (source, _) in enumerate(cells):
            exec(source, world)
            if k == 0:                                          # the environment's cell
                world["env"].unwrapped.reset(seed=seed)
    returns = []
    for start in measure.seeds_of(seed, 1, 100):
        torch.manual_seed(start)
        world["env"].unwrapped.np_random, _ = gym.utils.seeding.np_random(start)
        returns.append(float(world["teacher"].test(play=False)))
    return tests_of(printed.getvalue()), returns


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=pathlib.Path)
    options = parser.parse_args()
    try:
        cells = code_cells(options.file)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{options.file}: is not the course's notebook ({error})")
    torch.set_num_threads(1)
    np.bool8 = np.bool_                     # gym's checker, which the notebook keeps, asks for it
    sys.modules.setdefault("IPython", types.SimpleNamespace(display=None))      # it only imports it
    needed = [cell for cell in cells if "%matplotlib" not in cell[0]]           # not for Python
    teacher, student = (next(k for k, (source, _) in enumerate(needed) if loop in source)
                        for loop in ("in range(100):", "in range(50000):"))
    have = run.lines()
    line = run.cell("notebook's outputs", 0)
    if run.key(line) not in have:
        line |= {"commit": run.commit(), "tests": tests_of(needed[teacher][1]),
                 "student tests": tests_of(needed[student][1])}
        run.append(line)
    for seed in SEEDS:
        line = run.cell("notebook teacher", seed)
        if run.key(line) in have:
            continue
        begun = time.process_time()
        tests, returns = train(needed[:teacher + 1], seed)
        line |= {"commit": run.commit(), "cpu": run.cpu(), "return": round(np.mean(returns), 2),
                 "minutes": round((time.process_time() - begun) / 60, 2), "tests": tests}
        run.append(line)
        print(f"seed {seed}: {line['return']:.0f}", flush=True)


if __name__ == "__main__":
    main()
