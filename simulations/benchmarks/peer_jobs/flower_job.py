"""The job on Flower's own simulation runtime, as its PyTorch tutorial writes one: a `ClientApp` a user, `FedAdam` on the server, Ray between them.

    python flower_job.py FOLDER         rounds, one for each line on standard input
    python flower_job.py FOLDER 5 9     the clipped updates of users 5 and 9, to FOLDER/flower.npz

Chosen so that it is as quick as that can be: one actor with one CPU, which stays, and keeps the users' windows and negatives as tensors from its
first message on, so a round draws and prepares nothing; the model is made once and loaded with what arrives; no evaluation on clients; no log
lines from Ray. Training has one thread; the rest of Ray and Flower may use the other cores, which ours and pfl-research leave idle.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam
from flwr.simulation import run_simulation
from flwr.supercore.task_identity import TaskIdentity
from job_folder import Settings, Turns, UserTensors, read_settings, read_users, read_weights, write_updates
from plain_sasrec import PlainSASRec

FOLDER = "PEERS_JOB_FOLDER"
"""The environment variable that tells the actor where the job lies."""

app = ClientApp()


@lru_cache(maxsize=1)
def load(folder: str) -> tuple[Settings, list[UserTensors], PlainSASRec]:
    """The job, once a process."""
    torch.set_num_threads(1)
    settings = read_settings(Path(folder))
    return settings, read_users(Path(folder)), PlainSASRec(read_weights(Path(folder)), heads=settings.heads, blocks=settings.blocks)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Local steps of one user from the weights that arrive; back go weights that differ from them by the clipped update."""
    settings, users, model = load(os.environ[FOLDER])
    user = users[int(context.node_config["partition-id"])]
    start = message.content["arrays"].to_torch_state_dict()
    model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)
    losses = []
    for step in range(settings.steps):
        optimizer.zero_grad()
        loss = model.loss(*(tensor[step : step + 1] for tensor in user))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        state = model.state_dict()
        update = {name: state[name] - start[name] for name in start}
        norm = torch.stack([leaf.norm() for leaf in update.values()]).norm()
        factor = (settings.clip_norm / norm).clamp(max=1.0)
        clipped = {name: torch.add(start[name], leaf * factor) for name, leaf in update.items()}
    metrics = MetricRecord({"loss": losses[0], "num-examples": 1})
    return Message(RecordDict({"arrays": ArrayRecord(clipped), "metrics": metrics}), reply_to=message)


server = ServerApp()


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """All rounds, each when it is told to."""
    settings, _, model = load(os.environ[FOLDER])
    turns = Turns()

    def after(round: int, arrays: ArrayRecord) -> None:
        turns.end_and_wait(is_last=round == settings.rounds)

    strategy = FedAdam(
        fraction_train=settings.cohort / settings.nodes,
        fraction_evaluate=0.0,
        min_train_nodes=settings.cohort,
        min_available_nodes=settings.cohort,
        eta=settings.server_lr,
        eta_l=settings.lr,
        beta_1=settings.momentum,
        beta_2=settings.beta2,
        tau=settings.epsilon,
    )
    strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=settings.rounds, train_config=ConfigRecord(), evaluate_fn=after)


def update(user: int) -> tuple[dict[str, torch.Tensor], float]:
    """What one user's client app sends back, less the weights it was sent; and the loss at its first step."""
    start = {name.replace(".", "-"): leaf for name, leaf in read_weights(Path(os.environ[FOLDER])).items()}
    # Outside a run nobody says whose message it is, and Flower refuses to make one.
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    sent = Message(RecordDict({"arrays": ArrayRecord(start), "config": ConfigRecord()}), dst_node_id=1, message_type="train")
    context = Context(run_id=0, node_id=1, node_config={"partition-id": user}, state=RecordDict(), run_config={})
    back = app(sent, context).content
    arrays = back["arrays"].to_torch_state_dict()
    return {name.replace("-", "."): arrays[name] - start[name] for name in start}, float(back["metrics"]["loss"])


if __name__ == "__main__":
    os.environ[FOLDER] = sys.argv[1]
    if checked := [int(user) for user in sys.argv[2:]]:
        write_updates(Path(sys.argv[1]) / "flower.npz", {user: update(user) for user in checked})
    else:
        logging.getLogger("flwr").setLevel(logging.WARNING)
        ray = {"address": "local", "num_cpus": 1, "log_to_driver": False, "object_store_memory": 500_000_000}
        nodes = read_settings(Path(sys.argv[1])).nodes
        run_simulation(server, app, num_supernodes=nodes, backend_config={"init_args": ray, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
