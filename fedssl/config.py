"""The settings of a run: typed, frozen, checked at birth. Every field has a unit and a meaning.

Unknown keys are errors that name their neighbour. Only things that may be printed in public live here: data, keys and
random states are arguments. `docs/settings.md` is generated from these classes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """A section: frozen, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Settings):
    """Which histories, and how they are cut."""

    path: str = Field("", description="File of histories; a bare name is also looked up in $FEDSSL_DATA")
    format: str = Field("auto", description="auto: found by looking; else inter, lines, pairs, movielens, csv, tsv, jsonl, parquet, or package.module:name")
    columns: tuple[str, ...] = Field(
        (), description="csv, tsv, jsonl, parquet, inter: names of the user, item and perhaps time column; empty: found where they have usual names"
    )
    skip_bad_lines: bool = Field(False, description="Lines that cannot be read are counted and passed over; false: the first one stops")
    min_events: int = Field(5, ge=1, description="k-core: users and items with fewer events are dropped until none is left; 1: keep all")
    split: Literal["leave-one-out", "global-time"] = Field(
        "leave-one-out",
        description="leave-one-out: a user's last event is test, the one before validation, the rest training; global-time: training ends for all at "
        "one time, a user's first event from `test_from` on is test, the first between `validation_from` and `test_from` validation",
    )
    validation_from: float = Field(0.8, gt=0.0, description="global-time: below 1 the share of all events that are before it, else a time in the file's unit")
    test_from: float = Field(0.9, gt=0.0, description="global-time: as `validation_from`, and later")
    items: str = Field(
        "", description="Titles and attributes of items: `.item`, movies.dat, CSV or TSV with a header, Amazon's metadata as JSON lines; empty: none"
    )
    users: str = Field("", description="Attributes of users, for a probe alone: `.user`, users.dat, CSV or TSV with a header; empty: none")
    catalogue: str = Field("", description="A public catalogue.jsonl; empty: made from the data, which no epsilon covers")
    features: str = Field("", description="Features of items that `fedssl data embed` wrote: an item's vector is its own row and a learned projection of them")

    @model_validator(mode="after")
    def _columns_and_cuts_make_sense(self) -> DataConfig:
        if self.columns and (len(self.columns) not in (2, 3) or len(set(self.columns)) != len(self.columns) or not all(self.columns)):
            raise ValueError(f"columns = {list(self.columns)}; wanted two or three different names: user, item and perhaps time")
        if self.split == "global-time" and (self.validation_from < 1) == (self.test_from < 1) and self.validation_from >= self.test_from:
            raise ValueError(f"validation_from = {self.validation_from:g} is not before test_from = {self.test_from:g}; wanted an earlier one")
        return self


class EncoderConfig(Settings):
    """The sequence encoder, shared by all users."""

    name: str = Field("sasrec", description="An encoder that ships (sasrec, gru4rec, bert4rec, hgrn: `docs/encoders.md`), or package.module:name")
    width: int = Field(64, ge=1, description="Width D of item vectors and hidden states")
    blocks: int = Field(2, ge=0, description="Blocks; gru4rec: layers, 1 or more")
    heads: int = Field(2, ge=1, description="sasrec, bert4rec: attention heads; must divide width")
    hidden: int = Field(128, ge=1, description="sasrec, bert4rec: width of the feed-forward layer; gru4rec: of the state; hgrn has none")
    window: int = Field(50, ge=1, description="Positions L of one window: the newest events a prediction reads")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Share of activations zeroed in training; 0: none")
    first_items: Literal["random", "counts"] = Field(
        "random", description="Item vectors before training: random, or counts: from the company that items keep in the run's [counts]"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> EncoderConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; choose heads that divide it")
        return self


class TaskConfig(Settings):
    """One pretext task. What a task does not use, it ignores; `docs/settings.md` says which reads what."""

    name: str = Field(
        description="A task that ships (next-item, previous-item; masked-item, for bert4rec; contrastive, for any encoder), or package.module:name"
    )
    weight: float = Field(1.0, ge=0.0, description="Factor of this task's loss in the sum; 0: not computed")
    negatives: int = Field(
        0,
        ge=0,
        description="next-item, previous-item, masked-item: drawn per user, uniformly; 0: softmax over the whole catalogue. contrastive: invented histories",
    )
    temperature: float = Field(0.5, gt=0.0, description="contrastive: divisor of cosine similarities")
    keep: float = Field(
        0.6,
        gt=0.0,
        le=1.0,
        description="contrastive: share of a window that crop keeps, mask leaves, reorder leaves in place. masked-item: chance that an older event is read",
    )


class CountsConfig(Settings):
    """Item-to-item transition counts, summed over users once before training and added to the encoder's score."""

    lags: int = Field(3, ge=1, description="Pairs (earlier, later) up to this many events apart are counted")
    decay: float = Field(0.5, gt=0.0, le=1.0, description="A pair k events apart weighs decay^(k-1)")
    context: int = Field(3, ge=1, description="How many of the newest events are read when scoring")
    context_decay: float = Field(0.5, gt=0.0, le=1.0, description="The j-th newest event weighs context_decay^(j-1)")
    form: Literal["log1p", "log-lift"] = Field("log1p", description="log1p: log(1 + scale * counts); log-lift: log of observed over expected, smoothed")
    scale: float = Field(10.0, gt=0.0, description="log1p: factor inside the logarithm; log-lift: pseudo-counts")
    prior: float = Field(1.5, ge=0.0, description="log-lift: factor of the log popularity added to the lift; more than 1 favours what many people take")
    returns: float = Field(1.0, ge=0.0, description="Under a plan: factor of the log of how often people come back to an item they met")
    strength: float = Field(1.0, ge=0.0, description="Factor of the counts' score beside the encoder's; 0: encoder alone")
    top: int = Field(0, ge=0, description="Cells kept of each row, largest first; 0: all")
    blocks: int = Field(
        1, ge=1, le=999, description="Without a plan: rows are summed in so many rounds, each a part of them, so that memory holds one part and what was kept"
    )
    clip_norm: float | None = Field(
        None, gt=0.0, description="L2 norm over all cells to which every user's counts are shortened; None: raw counts, refused under a plan"
    )
    share: float = Field(
        0.85, gt=0.0, lt=1.0, description="Share of the privacy budget (of 1/z^2) that the counts take under a plan with a target epsilon; all where rounds = 0"
    )
    items: int = Field(
        1000,
        ge=1,
        le=20_000,
        description="Under a plan: transitions are counted between so many items N, the most met by a noised histogram; N^2 numbers go up",
    )
    popularity_share: float = Field(
        0.05, gt=0.0, lt=1.0, description="Under a plan: share of the counts' part (of 1/z^2) that goes to the histogram: how often each item was met"
    )


class DistillationConfig(Settings):
    """An encoder taught by the released counts, on the server: post-processing, which costs no privacy."""

    steps: int = Field(600, ge=1, description="Batches of walks that the encoder learns from")
    walks: int = Field(32, ge=1, description="Walks of a batch, drawn from the released table")
    length: int = Field(20, ge=2, description="Items of a walk; longer windows than that are never seen")
    lr: float = Field(0.003, gt=0.0, description="Adam's step size at its top; it warms up over 20 batches and decays to a fiftieth")


class HeadConfig(Settings):
    """A personal head: trained on the device, kept there, never sent."""

    name: Literal["none", "user-vector"] = Field("none", description="none, or user-vector: one vector added to the hidden state (FedPer)")
    lr: float = Field(1.0, gt=0.0, description="Step size of the head's local SGD")
    history: float = Field(
        0.0,
        ge=0.0,
        description="Factor of the mean of the person's own item vectors, added to the hidden state: so far in the window in training, of the whole history in "
        "a recommendation; nothing is kept for it. For causal encoders; 0: none",
    )
    adapt: float = Field(
        0.0,
        ge=0.0,
        description="Step size of the user-vector's one step from each event that a device records, between rounds and in its memory alone; "
        "no round and no evaluation sees it; 0: none",
    )

    @model_validator(mode="after")
    def _there_is_something_to_adapt(self) -> HeadConfig:
        if self.adapt and self.name == "none":
            raise ValueError(f"adapt = {self.adapt:g} moves a user-vector, and name is none; set name = 'user-vector', or adapt = 0")
        return self


class LocalConfig(Settings):
    """What one user does in a round."""

    steps: int = Field(1, ge=1, description="Local SGD steps S")
    lr: float = Field(1.0, gt=0.0, description="Step size of local SGD")
    windows: int = Field(1, ge=1, description="Windows B a step reads, each drawn at random from the training history")
    reduction: Literal["mean", "sum"] = Field(
        "mean", description="A user's softmax loss: mean over real positions, or their sum / (windows * window), so that more history pulls harder"
    )
    weight_decay: float = Field(0.0, ge=0.0, description="Decoupled decay a step, on touched item rows and the encoder; 0: none")
    proximal: float = Field(0.0, ge=0.0, description="FedProx: pull back to the round's weights, from the second step on; lr * proximal is at most 1; 0: none")
    grid_step: float = Field(
        2.0**-20, ge=2.0**-60, description="Without a clip: the grid of updates, a power of two; a coordinate beyond 2^24 steps breaks its user"
    )

    @model_validator(mode="after")
    def _the_pull_does_not_overshoot(self) -> LocalConfig:
        if self.lr * self.proximal > 1:
            raise ValueError(f"lr * proximal = {self.lr * self.proximal:g} pulls beyond the round's weights; keep proximal at most {1 / self.lr:g}")
        return self


class ServerConfig(Settings):
    """How rounds are made of users, and updates made into weights."""

    rounds: int = Field(100, ge=0, description="Training rounds; 0: the run only counts, and trains nobody's encoder")
    cohort: float = Field(64, gt=0, description="Expected users a round")
    sampling: Literal["passes", "poisson"] = Field(
        "passes", description="passes: each user once a pass, shuffled, refused under a plan; poisson: a coin a user"
    )
    weighting: Literal["equal", "positions", "windows"] = Field(
        "equal",
        description="equal: users weigh alike; positions: by positions trained in the round; windows: by windows that a history fills, up to 16. "
        "The last two are refused under a plan",
    )
    optimizer: str = Field("adam", description="A server optimiser that ships (sgd, adam, adamw, adagrad, yogi), or package.module:name")
    lr: float = Field(0.003, gt=0.0, description="Server step size at the top of the schedule")
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="sgd: momentum; adam, adamw, yogi: beta1; adagrad has none")
    beta2: float = Field(0.98, ge=0.0, lt=1.0, description="adam, adamw, yogi: decay of the squared update")
    epsilon: float = Field(1e-8, gt=0.0, description="adam, adamw, adagrad, yogi: added to the root of the squared update; for the last two 0.001 is usual")
    weight_decay: float = Field(0.0, ge=0.0, description="adamw: weights shrink by lr * weight_decay a round, all but the padding row; 0: none")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="constant, or cosine decay to `floor` over the rounds")
    floor: float = Field(0.02, ge=0.0, le=1.0, description="cosine: the last round's share of lr")
    warmup: int = Field(0, ge=0, description="Rounds over which lr grows linearly from 0; 0: none")
    rows_left_out: float = Field(
        0.0, ge=0.0, lt=1.0, description="With `[data] features`: share of items without their own row in a round, so that features learn to speak alone"
    )
    average_from: int = Field(
        0, ge=0, description="The model is the mean of the weights after this round and all later ones; training goes on from the last; 0: none"
    )

    @model_validator(mode="after")
    def _decay_is_read(self) -> ServerConfig:
        if self.weight_decay and self.optimizer in ("sgd", "adam", "adagrad", "yogi"):
            raise ValueError(f"weight_decay = {self.weight_decay:g} is read by adamw alone; set optimizer = 'adamw', or take it away")
        if self.lr * self.weight_decay > 1:
            raise ValueError(f"lr * weight_decay = {self.lr * self.weight_decay:g} shrinks weights beyond 0; keep weight_decay at most {1 / self.lr:g}")
        if self.average_from > self.rounds:
            raise ValueError(f"average_from = {self.average_from} comes after the last of {self.rounds} rounds; choose an earlier one, or 0 for no average")
        return self


class PrivacyConfig(Settings):
    """What the run promises each user. Printed in every report."""

    mode: Literal["central", "local", "window"] = Field(
        "central",
        description="Who adds the noise, and what is protected. central: the server, once to a cohort's sum; it is trusted. local: every user to their own "
        "upload, before it leaves; nobody is trusted, and far more noise is in the sum. window: as local, but the promise is about one training window of a "
        "device and not about the user",
    )
    clip_norm: float | None = Field(
        None, ge=1e-12, description="Largest L2 norm of one user's whole update, or under mode = 'window' of one window's gradient; None: no clipping"
    )
    window_rate: float = Field(
        0.25, gt=0.0, le=1.0, description="mode = 'window': chance of each training window to be read in a local step; the device's own secret coins"
    )
    clip: Literal["fixed", "adaptive"] = Field(
        "fixed", description="fixed: clip_norm in all rounds; adaptive: in the first one, then it follows a quantile of the users' norms"
    )
    clip_quantile: float = Field(0.5, gt=0.0, lt=1.0, description="adaptive: share of users whose update is to pass unshortened")
    clip_rate: float = Field(
        0.2, gt=0.0, le=10.0, description="adaptive: a round multiplies the clip by exp(-clip_rate * (share of users within it - clip_quantile))"
    )
    clip_share: float = Field(
        0.01, gt=0.0, lt=1.0, description="adaptive, under a plan: share of a round's privacy (of 1/z^2) that the number of users within the clip takes"
    )
    noise_multiplier: float = Field(0.0, ge=0.0, description="Noise standard deviation / clip_norm, on what `mode` says; 0: no plan unless `epsilon` is given")
    counts_noise_multiplier: float = Field(0.0, ge=0.0, description="The same for the counts; needed with `noise_multiplier` where [counts] is on")
    epsilon: float | None = Field(None, gt=0.0, description="Target epsilon of the whole run: noise is solved for it; None: noise is given")
    delta: float = Field(1e-6, gt=0.0, le=0.01, description="Chance that the epsilon promise fails; keep it below 1 / number of users")
    fleet_users: int = Field(
        0,
        ge=0,
        description="A question, for simulations alone: what would this epsilon cost a fleet of so many users? The mean gets the noise that theirs would "
        "have, and the users at hand are promised nothing; 0: not asked",
    )

    @property
    def has_plan(self) -> bool:
        """Whether noise is added and epsilon accounted."""
        return self.noise_multiplier > 0 or self.epsilon is not None

    @property
    def is_local(self) -> bool:
        """Whether every user adds their own noise: to one update, or window by window."""
        return self.has_plan and self.mode != "central"

    @property
    def is_by_window(self) -> bool:
        """Whether the promise is about one training window."""
        return self.has_plan and self.mode == "window"

    @model_validator(mode="after")
    def _noise_needs_a_clip(self) -> PrivacyConfig:
        if self.has_plan and self.clip_norm is None:
            raise ValueError("noise without a clip promises nothing; set clip_norm")
        if self.fleet_users and not self.has_plan:
            raise ValueError(f"fleet_users = {self.fleet_users} asks what an epsilon would cost a fleet, and there is none; set epsilon, or fleet_users = 0")
        if self.clip == "adaptive" and self.clip_norm is None:
            raise ValueError("clip = 'adaptive' needs a clip for the first round; set clip_norm")
        if self.is_local and self.fleet_users:
            raise ValueError(f"fleet_users asks about noise that a server adds once; under mode = '{self.mode}' every user adds their own, set fleet_users = 0")
        if self.is_by_window and self.clip == "adaptive":
            raise ValueError("clip = 'adaptive' asks about norms of users' updates; under mode = 'window' single gradients are clipped, set clip = 'fixed'")
        return self


class EvaluationConfig(Settings):
    """When and how recommendations are measured."""

    every: int = Field(0, ge=0, description="Rounds between validations; 0: only after the last round")
    users: int = Field(2000, ge=0, description="Users in a validation between rounds, a fixed random set; 0: all. The last one and the test always take all")
    ks: tuple[int, ...] = Field((5, 10), description="Cut-offs of HR and NDCG")
    patience: int = Field(
        0,
        ge=0,
        description="Early stop: so many validations without a better NDCG@10 `unseen` end the run, and its model is that of the best one; "
        "0: all rounds are run. Refused under a plan",
    )
    on_devices: int = Field(
        0,
        ge=0,
        description="Rounds between evaluations where the events are, and one after the last round: every node ranks the last event of each of its users and "
        "sends sums of hits, NDCG and users; 0: none. Refused under a plan",
    )

    @model_validator(mode="after")
    def _patience_has_something_to_look_at(self) -> EvaluationConfig:
        if self.patience and not self.every:
            raise ValueError(f"patience = {self.patience} needs validations between rounds; set every, or patience = 0")
        if self.patience and 10 not in self.ks:
            raise ValueError(f"patience = {self.patience} looks at NDCG@10, and ks = {list(self.ks)} has no 10; add it")
        return self


class DeviceEvaluation(Settings):
    """What a recipe says of evaluations where the events are."""

    every: int = Field(ge=1, description="Rounds of training between two")
    ks: tuple[int, ...] = Field(min_length=1, description="Cut-offs of HR and NDCG")


class SystemConfig(Settings):
    """How fast, never what: changes nothing beyond rounding."""

    users_per_chunk: int = Field(32, ge=1, description="Users trained at once, fewer where windows are longer than 50")
    shards: int = Field(1, ge=1, description="Nodes that the simulation deals its users to")
    workers: int = Field(0, ge=0, description="Processes that train chunks, on shared histories and weights; 1: none but the run itself, 0: one a core")
    checkpoint_every: int = Field(50, ge=1, description="Rounds between checkpoints")
    checkpoint_seconds: float = Field(60.0, ge=0.0, description="Seconds after which a checkpoint is due, whichever comes first; 0: by rounds alone")
    keep_checkpoints: int = Field(1, ge=1, description="Newest checkpoints kept; older ones are removed")


class RunConfig(Settings):
    """A whole RUN.toml."""

    preset: str = Field("", description="Name of the preset this run began with; empty: none")
    seed: int = Field(1, ge=0, description="Chance of initial weights, windows, views, negatives, dropout, and of cohorts without a plan")
    start: str = Field("", description="A checkpoint to begin from, of this catalogue or another one; empty: from nothing")
    data: DataConfig = DataConfig()
    encoder: EncoderConfig = EncoderConfig()
    task: tuple[TaskConfig, ...] = (TaskConfig(name="next-item"),)
    counts: CountsConfig | None = None
    distillation: DistillationConfig | None = None
    head: HeadConfig = HeadConfig()
    local: LocalConfig = LocalConfig()
    server: ServerConfig = ServerConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    system: SystemConfig = SystemConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> RunConfig:
        if not any(task.weight > 0 for task in self.task):
            raise ValueError("[[task]] has no task with a weight above 0; nothing would be learned")
        if self.local.grid_step != 2.0 ** round(_log2(self.local.grid_step)):
            raise ValueError(f"[local] grid_step {self.local.grid_step} is not a power of two; try 2^-20 = {2.0**-20}")
        if self.local.reduction == "sum" and self.server.weighting != "equal":
            raise ValueError(f"[local] reduction = 'sum' with [server] weighting = '{self.server.weighting}' weighs long histories twice; set one of them back")
        if self.privacy.epsilon is not None and self.privacy.noise_multiplier > 0:
            raise ValueError("[privacy] epsilon and noise_multiplier are both given; give one, the other follows from it")
        mode = self.privacy.mode
        if self.privacy.is_local and self.server.sampling != "passes":
            raise ValueError(f"[server] sampling = 'poisson' does not say how often a user uploads; under privacy.mode = '{mode}' set sampling = 'passes'")
        if self.privacy.is_local and self.counts is not None:
            raise ValueError(f"[counts] would be a whole matrix of noise from every user; under privacy.mode = '{mode}' take the section away (counts = none)")
        if self.privacy.is_by_window and self.head.name != "none":
            raise ValueError("[head] would carry one window into the gradients of others, without noise; under privacy.mode = 'window' set name = 'none'")
        if self.privacy.is_by_window and (self.local.weight_decay or self.local.proximal):
            raise ValueError("[local] weight_decay and proximal are no gradient of a window; under privacy.mode = 'window' set both to 0")
        if self.start and self.encoder.first_items == "counts":
            raise ValueError("start takes item vectors from a checkpoint, [encoder] first_items = 'counts' from the counts; set first_items = 'random'")
        if self.encoder.first_items == "counts" and (self.counts is None or self.privacy.has_plan):
            raise ValueError(
                "[encoder] first_items = 'counts' needs a [counts] section without a privacy plan; add one, set first_items = 'random', "
                "or under a plan let [distillation] begin with the counts"
            )
        if not self.server.rounds and self.counts is None:
            raise ValueError("[server] rounds = 0 leaves nothing to do; give it rounds, or the run a [counts] section")
        if self.distillation is not None and (self.counts is None or not self.privacy.has_plan):
            raise ValueError("[distillation] learns from counts released under a privacy plan; add [counts] and a plan, or set distillation = none")
        if self.distillation is not None and self.distillation.length > self.encoder.window:
            raise ValueError(f"[distillation] length = {self.distillation.length} is more than the encoder's window {self.encoder.window}; shorten the walks")
        if self.privacy.has_plan:
            if self.server.sampling != "poisson" and not self.privacy.is_local:
                raise ValueError("[server] sampling = 'passes' has no amplification to account; under a plan set sampling = 'poisson'")
            if self.server.weighting != "equal":
                raise ValueError(f"[server] weighting = '{self.server.weighting}' lets a user weigh more than the clip; under a plan set weighting = 'equal'")
            if self.evaluation.patience:
                raise ValueError(
                    "[evaluation] patience would stop where people's held-out events say so, and these are no sum that the plan accounts for; "
                    "under a plan set patience = 0"
                )
            if self.evaluation.on_devices:
                raise ValueError(
                    "[evaluation] on_devices would send sums of people's last events, and these are no sum that the plan accounts for; under a plan set it to 0"
                )
            if self.counts is not None and self.counts.clip_norm is None:
                raise ValueError("[counts] has no clip_norm; under a plan every sum needs one")
            if self.counts is not None and self.counts.blocks > 1:
                raise ValueError(f"[counts] blocks = {self.counts.blocks} would ask everybody as often; under a plan counts are released once, set blocks = 1")
            if self.counts is not None and self.privacy.epsilon is None and self.privacy.counts_noise_multiplier == 0:
                raise ValueError("[privacy] counts_noise_multiplier is 0 while [counts] is on; set it, or give a target epsilon")
        return self


def _log2(value: float) -> float:
    import math

    return math.log2(value)
