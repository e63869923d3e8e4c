"""Data that other policies than a learning teacher record. (To be replaced.)"""
import cql_pendulum as ours

NAMES = ("20 drawn",)


def make(name, seed, teacher):
    """The Data of a name: 20 episodes of the teacher after its training, torques drawn."""
    ours.seed_everything(seed)
    data = ours.Data()
    for _ in range(20):
        data.update_data(teacher)
    return data
