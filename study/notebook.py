"""The course's own notebook, run: what its teacher returns, and what its stored outputs say.

python study/notebook.py FILE       FILE is "1.离线学习.ipynb" of the course's repository

The notebook's cells are executed as they are in FILE, up to the teacher's training, once for each
seed of 0 to 9; nothing of them is kept. A line for each goes to results/cells.jsonl: the loop's own
tests (means of ten episodes) and 100 episodes after it, from the starts that the program's teacher
of that seed has. Another line has the outputs that FILE stores. One thread; two minutes a seed.
"""
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

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import measure  # noqa: E402
import run  # noqa: E402


def code_cells(path):
    """The notebook's code cells, with their sources and printed outputs: a list of (text, text)."""
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and "%matplotlib" not in "".join(cell["source"]):
            printed = ["".join(output.get("text", [])) for output in cell["outputs"]]
            found.append(("".join(cell["source"]), "".join(printed)))
    return found


def tests_of(printed):
    """The lines "epoch return" or "update return" of a loop's output: a list of [step, return]."""
    return [[int(step), float(value)]
            for step, value in re.findall(r"(?m)^(\d+) (-\d+\.\d+)$", printed)]


def train(sources, seed):
    """Execute the cells in a namespace of their own: the loop's tests, [step, return], and the
    returns of 100 episodes of the teacher after it."""
    torch.manual_seed(seed)
    random.seed(seed)
    world, printed, returns = {"__name__": "notebook"}, io.StringIO(), []
    with contextlib.redirect_stdout(printed):
        for k, source in enumerate(sources):
            exec(source, world)
            if k == 0:                                          # the environment's cell
                world["env"].unwrapped.reset(seed=seed)
    for start in measure.seeds_of(seed, 1, 100):
        torch.manual_seed(start)
        world["env"].unwrapped.np_random, _ = gym.utils.seeding.np_random(start)
        returns.append(float(world["teacher"].test(play=False)))
    return tests_of(printed.getvalue()), returns


def main(path):
    cells = code_cells(path)
    np.bool8 = np.bool_                     # gym's checker, which the notebook keeps, asks for it
    sys.modules.setdefault("IPython", types.SimpleNamespace(display=None))      # it only imports it
    teacher, student = (next(k for k, (source, _) in enumerate(cells) if loop in source)
                        for loop in ("in range(100):", "in range(50000):"))
    have, about = run.lines(), {"steps": None, "argv": None, "commit": run.commit()}
    line = run.cell("notebook's outputs", 0) | about
    if run.key(line) not in have:
        run.append(line | {"tests": tests_of(cells[teacher][1]),
                           "student tests": tests_of(cells[student][1])})
    for seed in range(10):
        line = run.cell("notebook teacher", seed) | about
        if run.key(line) not in have:
            begun = time.process_time()
            tests, returns = train([source for source, _ in cells[:teacher + 1]], seed)
            run.append(line | {"cpu": run.cpu(), "return": round(float(np.mean(returns)), 2),
                               "minutes": round((time.process_time() - begun) / 60, 2),
                               "tests": tests})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
