"""The job on Apple's pfl-research, as its own benchmarks write one: `SimulatedBackend`, `FederatedAveraging`, `PyTorchModel`.

    python pfl_job.py FOLDER            rounds, one for each line on standard input
    python pfl_job.py FOLDER 5 9        the clipped updates of users 5 and 9, to FOLDER/pfl-research.npz

Chosen so that it is as quick as pfl can be: one process, so nothing is sent or pickled; the users' data sets are made before the first round
and kept as tensors, windows and negatives included, so a round draws and prepares nothing; the local batch is one window, whose slices pfl
keeps; no evaluation after the first round, which is not timed, and no validation cohort; clipping alone (`NormClippingOnly`) as the central
mechanism; a sampler that draws nothing. `use_torch_compile` is left out: it compiles a model's `forward`, and pfl calls `loss`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from job_folder import Turns, read_settings, read_users, read_weights, write_updates
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.context import UserContext
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.privacy import CentrallyAppliedPrivacyMechanism, NormClippingOnly
from plain_sasrec import PlainSASRec


class Model(PlainSASRec):
    """pfl asks a model for metrics too."""

    @torch.no_grad()
    def metrics(self, *tensors: torch.Tensor) -> dict[str, Weighted]:
        return {"loss": Weighted.from_unweighted(float(self.loss(*tensors)))}


class TakeTurns(TrainingProcessCallback):
    """A round ends here; the next begins when it is told to."""

    def __init__(self, rounds: int):
        self.turns, self.left = Turns(), rounds

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        self.turns.end_and_wait()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int) -> tuple[bool, Metrics]:
        self.left -= 1
        self.turns.end_and_wait(is_last=self.left == 0)
        return False, Metrics()


class Job:
    """All of it but the rounds."""

    def __init__(self, folder: Path):
        self.settings = settings = read_settings(folder)
        datasets = [PyTorchTensorDataset(user, user_id=str(number)) for number, user in enumerate(read_users(folder))]
        module = Model(read_weights(folder), heads=settings.heads, blocks=settings.blocks)
        server = torch.optim.Adam(module.parameters(), lr=settings.server_lr, betas=(settings.momentum, settings.beta2), eps=settings.epsilon)
        self.model = PyTorchModel(module, local_optimizer_create=torch.optim.SGD, central_optimizer=server)
        self.clipping = CentrallyAppliedPrivacyMechanism(NormClippingOnly(2, settings.clip_norm))
        self.training = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=settings.lr, local_batch_size=1)
        order = np.random.default_rng(0).permutation(len(datasets)).tolist()
        self.users = FederatedDataset(datasets.__getitem__, get_user_sampler("minimize_reuse", order))
        self.backend = SimulatedBackend(training_data=self.users, val_data=self.users, postprocessors=[self.clipping])
        self.algorithm = FederatedAveraging()
        self.params = NNAlgorithmParams(
            central_num_iterations=settings.rounds, evaluation_frequency=settings.rounds, train_cohort_size=settings.cohort, val_cohort_size=None
        )

    def run(self) -> None:
        self.algorithm.run(self.params, self.backend, self.model, self.training, callbacks=[TakeTurns(self.settings.rounds)], send_metrics_to_platform=False)

    def update(self, user: int) -> tuple[dict[str, torch.Tensor], float]:
        """What one user adds to the sum in the second iteration, by the calls that `SimulatedBackend` makes; and the loss at its first step."""
        dataset = self.users.make_dataset_fn(user)
        ((context,), _, _) = self.algorithm.get_next_central_contexts(self.model, 1, self.params, self.training)
        statistics, metrics = self.algorithm.simulate_one_user(self.model, dataset, context)
        about = UserContext(num_datapoints=len(dataset), seed=0, user_id=dataset.user_id, metrics=metrics)
        clipped, _ = self.clipping.postprocess_one_user(stats=statistics, user_context=about)
        with torch.no_grad():
            loss = float(self.model.pytorch_model.loss(*next(iter(dataset.iter(1)))))
        return {name.replace("-", "."): leaf.clone() for name, leaf in clipped.items()}, loss


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = Job(Path(sys.argv[1]))
    if checked := [int(user) for user in sys.argv[2:]]:
        write_updates(Path(sys.argv[1]) / "pfl-research.npz", {user: job.update(user) for user in checked})
    else:
        job.run()
