"""Pictures of two students that are trained here: pendulums.gif and torques.png.

python study/pictures.py    some minutes, and three more where seed 0's teacher is not kept
"""
import math
import os
import pathlib
import sys
import tempfile

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import cql_pendulum as ours  # noqa: E402
import measure  # noqa: E402
import run  # noqa: E402

UPDATES = 10_000                        # as in README's experiments


def draw_torques(path, seed=0):
    """Train sac and cql on a seed's last 10, and draw what they promise and deliver. Returns the
    two agents."""
    figure = Figure(figsize=(13, 8.6), dpi=100, layout="constrained")
    bands, agents = figure.subfigures(2, 1), []
    for band, kind, words in zip(bands, ("sac", "cql"), ("no penalty", "with the penalty")):
        argv = run.with_files(run.cell(kind, seed, "last 10", steps=UPDATES))
        with tempfile.TemporaryDirectory() as folder:
            data, _, agent = ours.main([*argv, "--out", f"{folder}/run"])
        returned = ours.evaluate(agent, measure.seeds_of(seed, 1, 100))[0].mean()
        draw_agent(band, agent, data.rows)
        agents.append(agent)
        band.suptitle(f"{kind.upper()}, {words}: return {returned:,.0f}", fontsize=17,
                      weight="bold")
    panels = [axes for band in bands for axes in band.axes]
    low = min(axes.get_ylim()[0] for axes in panels)
    high = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:                         # one scale, and room for what stands at the bottom
        axes.set_ylim(low - 0.17 * (high - low), high)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
                  fontsize=12)
    figure.suptitle(f"The teacher's last 10 episodes (seed {seed}), after {UPDATES:,} updates")
    figure.savefig(path)
    return agents


def draw_agent(figure, agent, rows):
    """Three panels: in a state of the data, what each torque promises and what it and then the
    policy deliver, a mean of 20 episodes; below them the data's torques near it. No bonus is added:
    the green line is what is paid."""
    choices = measure.CHOICES.astype(float)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (what, state) in zip(panels, three_states(rows).items()):
        promised = agent.promise(np.tile(state, (41, 1)), choices)
        delivered = np.array([measure.deliver(agent, np.tile(state, (20, 1)).astype(float),
                                              np.full(20, torque))[0].mean() for torque in choices])
        near = (abs(rows[:, :3] - state) < 0.3).all(axis=1)
        axes.plot(choices, promised, "C3", lw=2.5, label="promised")
        axes.plot(choices, delivered, "C2--", lw=2.5, label="delivered")
        axes.fill_between(choices, delivered, promised, where=promised > delivered, lw=0,
                          interpolate=True, color="C3", alpha=0.15, label="promised too much")
        below = {"clip_on": False, "transform": axes.get_xaxis_transform()}     # y: 0 is the bottom
        axes.plot(rows[near, 3], np.full(near.sum(), 0.03), "|k", ms=12, label="data near here",
                  **below)
        axes.plot(measure.mean_torque(agent, state[None]), 0.09, "^C1", ms=11,
                  label="the policy's torque", **below)
        degrees = math.degrees(math.atan2(state[1], state[0]))
        axes.set_title(f"{what} ({degrees:z.0f}°, {state[2]:z.1f} rad/s)", fontsize=13)
        axes.set_xlabel("torque now (N m), then the policy's", fontsize=12)
        axes.set(xlim=(-2.1, 2.1), xticks=[-2, -1, 0, 1, 2])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("discounted rewards, 100 at most", fontsize=12)


def three_states(rows):
    """Three states of the data: the nearest to standing upright, the fastest that swings up, and
    the nearest to hanging still."""
    states = rows[:, :3]
    upward = (states[:, 0] < math.cos(math.radians(20))) & (states[:, 1] * states[:, 2] < 0)
    upright, hanging = (np.linalg.norm((states - [x, 0, 0]) / [1, 1, 8], axis=1) for x in (1, -1))
    return {"upright": states[upright.argmin()],
            "swinging up": states[np.where(upward, abs(states[:, 2]), -1).argmax()],
            "hanging": states[hanging.argmin()]}


def draw_pendulums(agents, path):
    """An episode of sac and of cql side by side, both from hanging still: 200 frames of 0.05 s."""
    size, frames, font = 240, [], ImageFont.load_default(18)
    for pair in zip(*map(film, agents)):
        frame = Image.new("RGB", (2 * size, size + 30), "white")
        words = ImageDraw.Draw(frame)
        for k, title in enumerate(("SAC: no penalty", "CQL: with the penalty")):
            frame.paste(pair[k].resize((size, size)), (k * size, 30))
            words.text((k * size + size / 2, 16), title, "black", font, "mm")
        frames.append(frame.quantize(32))
    frames[0].save(path, append_images=frames[1:], save_all=True, duration=50, loop=0)


def film(agent):
    """A picture of each state of an episode from hanging still."""
    ours.seed_everything(0)
    ours.env.unwrapped.state = np.array([math.pi, 0.0])
    state, pictures, over = [-1, 0, 0], [], False
    while not over:
        pictures.append(Image.fromarray(ours.env.render()))
        state, _, over, _ = ours.env.step([agent.get_action(state)])
    return pictures


if __name__ == "__main__":
    os.environ["SDL_VIDEODRIVER"] = "dummy"                     # pygame draws without a window
    pair = draw_torques(HERE / "results" / "torques.png")
    draw_pendulums(pair, HERE / "results" / "pendulums.gif")
