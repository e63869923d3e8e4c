"""Change one line, guess, then look: README's experiments, each with what was measured.

python study/experiments.py             what results/experiments.jsonl lacks, on SEEDS
python study/experiments.py NAME        one of them, on ten.npz; it asks for your guess first
python study/experiments.py --table     the results so far

An experiment is a change of the text of cql_pendulum.py and a command line. The changed program
runs in a temporary folder; the change's words are those of README, and a test says when one no
longer fits. Seed 0's ten episodes are ten.npz, the last ten of seed 0's teacher; the other seeds'
lie in study/kept once run.py has trained their teachers.
"""
import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import pandas as pd

STUDY = pathlib.Path(__file__).parent
PROGRAM, FILE = STUDY.parent / "cql_pendulum.py", STUDY / "results" / "experiments.jsonl"
SEEDS = range(5)
SAC = "--student sac --steps 10000"
# name: the question, the lines to change (old, new), and the command line behind --dataset
EXPERIMENTS = {
    "penalty": ("What does the penalty do on ten good episodes? (No line changes.)", [],
                "--steps 10000"),
    "no-penalty": ("And without it?", [], SAC),
    "random": ("Three episodes of random torques come first. Is that enough for SAC?", [],
               f"--random 3 {SAC}"),
    "layernorm": ("LayerNorm keeps critics from running away. Does it save SAC?", [
        ("torch.nn.Linear(4, WIDTH), torch.nn.ReLU(),",
         "torch.nn.Linear(4, WIDTH), torch.nn.LayerNorm(WIDTH), torch.nn.ReLU(),"),
        ("torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(),",
         "torch.nn.Linear(WIDTH, WIDTH), torch.nn.LayerNorm(WIDTH), torch.nn.ReLU(),")], SAC),
    "clip": ("No target may promise more than is possible. Does that save SAC?", [
        ("return reward + GAMMA * (1 - over) * value",
         "return (reward + GAMMA * (1 - over) * value).clamp(-103, 100)")], SAC),
    "discount": ("A shorter view: does a discount of 0.95 save SAC?", [
        ("GAMMA = 0.99", "GAMMA = 0.95")], SAC),
    "slow-critics": ("Critics that learn ten times more slowly?", [
        ("LR_VALUE = 3e-3", "LR_VALUE = 3e-4")], SAC),
    "imitate": ("SAC's policy is also asked to give the data's torques, as in TD3+BC. Enough?", [
        ("        loss_action, entropy = self._get_loss_action(state)\n",
         "        loss_action, entropy = self._get_loss_action(state)\n"
         "        drawn, _ = self.model_action(state)\n"
         "        loss_action = loss_action + self.loss_fn(drawn, action)\n")], SAC),
    "greedy": ("The critic's favourite of 41 torques, not the policy's. Who was to blame?", [
        ("            return self.model_action(state)[0].item()               # [1, 3] -> [1, 1]\n",
         "            torques = torch.linspace(-2, 2, 41)\n"
         "            promised = self.promise(state.repeat(41, 1), torques)\n"
         "            return torques[promised.argmax()].item()\n")], SAC),
    "deeper": ("A second hidden layer for CQL's policy: how much sooner does it swing up?", [
        ("torch.nn.Sequential(torch.nn.Linear(3, WIDTH), torch.nn.ReLU())",
         "torch.nn.Sequential(torch.nn.Linear(3, WIDTH), torch.nn.ReLU(),\n"
         "                                                torch.nn.Linear(WIDTH, WIDTH), "
         "torch.nn.ReLU())")], "--steps 4001"),
    "as-is": ("The same without that layer, to compare.", [], "--steps 4001"),
}


def changed(name):
    """The text of the program with an experiment's lines; ValueError where one no longer fits."""
    text = PROGRAM.read_text()
    for old, new in EXPERIMENTS[name][1]:
        if text.count(old) != 1:
            raise ValueError(f"{name}: {old!r} stands {text.count(old)} times in {PROGRAM.name}")
        text = text.replace(old, new)
    return text


def episodes(seed):
    """The command line's words for the last ten episodes of a seed's teacher."""
    if seed == 0:
        return ["--dataset", str(STUDY / "ten.npz")]
    return ["--dataset", str(STUDY / "kept" / str(seed) / "dataset.npz"), "--last", "10"]


def run(name, seed):
    """Train once: a dict of the return of the 100 final episodes, and the last test's promise."""
    argv = [*episodes(seed), "--seed", str(seed), *EXPERIMENTS[name][2].split()]
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder, "cql_pendulum.py")
        program.write_text(changed(name))
        done = subprocess.run([sys.executable, program, *argv, "--out", f"{folder}/run"], text=True,
                              stdout=subprocess.PIPE, check=True)
        log = pd.read_csv(f"{folder}/run/log.csv")
    returned = re.search(r"^the student +100 +(\S+)", done.stdout, re.MULTILINE)
    return {"name": name, "seed": seed, "argv": argv[2:], "return": float(returned[1]),
            "promised": round(log["promised"].iloc[-1], 2)}


def results():
    """What the file holds: a frame with a row for each run."""
    if not FILE.exists():
        return pd.DataFrame(columns=["name", "seed", "return", "promised"])
    return pd.read_json(FILE, lines=True)


def table():
    """By experiment: the mean, least and most return, the mean promise, and the number of seeds."""
    found = results().groupby("name").agg(
        mean=("return", "mean"), least=("return", "min"), most=("return", "max"),
        promised=("promised", "mean"), seeds=("seed", "nunique"))
    return found.reindex([name for name in EXPERIMENTS if name in found.index])


def answer(name):
    """README's words for an experiment: seed 0's return, and the mean, least and most of all."""
    found = results().query("name == @name").set_index("seed")["return"]
    one, mean, least, most = (f"{x:,.0f}" for x in (found[0], found.mean(), found.min(),
                                                    found.max()))
    return f"{one} (mean of {len(found)} seeds {mean}, {least} to {most})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=EXPERIMENTS, metavar="NAME",
                        help=", ".join(EXPERIMENTS))
    parser.add_argument("--table", action="store_true", help="print the results so far")
    options = parser.parse_args()
    if options.table:
        print(table().round(0).to_string())
    elif options.name:
        print(EXPERIMENTS[options.name][0])
        input("An untrained student returns about -1,430, the teacher about -150. Your guess? ")
        print(f"now: {run(options.name, 0)['return']}; measured before:")
        print(results().query("name == @options.name").drop(columns="argv").to_string(index=False))
    else:
        have = set(zip(results()["name"], results()["seed"]))
        for name in EXPERIMENTS:
            for seed in SEEDS:
                if (name, seed) not in have:
                    line = json.dumps(run(name, seed))
                    with open(FILE, "a") as file:
                        file.write(line + "\n")
                    print(line, flush=True)


if __name__ == "__main__":
    main()
