"""Once: the first model of the devices, learned from people who do not exist, beside what the server's run begins with."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import read_run

from fedssl.catalogue import write_catalogue
from fedssl.checkpoints import list_checkpoints, read_checkpoint
from fedssl.data.readers import write_lines
from fedssl.data.synthetic import synthesize
from fedssl.device_model import write_device_model
from fedssl.weights import to_numpy

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "/var/lib/fedssl/model")

if (OUT / "device" / "recipe.json").exists():
    sys.exit()
with tempfile.TemporaryDirectory() as work:
    people = Path(work, "people.txt")
    write_lines(synthesize(users=200, items=200, seed=1, mean_events=30.0), people)
    run = simulate(read_run(Path(__file__).with_name("run.toml"), [f"data.path={people}", "data.min_events=1"]), out=Path(work, "run"))
    learned = read_checkpoint(list_checkpoints(run.folder / "checkpoints")[-1])
    OUT.mkdir(exist_ok=True)
    write_catalogue(learned.catalogue, OUT / "catalogue.jsonl")
    (OUT / "run.toml").write_text((run.folder / "run.toml").read_text())
    weights = to_numpy(learned.state.released(learned.recipe))
    write_device_model(OUT / "device", learned.recipe, weights, learned.catalogue, learned.state.counts, run=learned.run, round=learned.state.round)
