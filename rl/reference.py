"""The frozen policy that alignment started from: tables spread over the learners, dense weights whole on each."""

import torch

from cluster.process import Process
from cluster.storage import Storage
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from rl.drawing import Drawing
from sharding.item_index import evaluating
from trainer.assembly import Assembly, assemble
from trainer.checkpoint_reader import CheckpointReader
from trainer.configuration import CHECKPOINTS, PretrainConfig
from trainer.run_state import load_weights


class Reference:
    """Cost: a second copy of dense weights and tables, without optimizer state."""

    def __init__(self, assembly: Assembly, drawing: Drawing):
        self.assembly, self.drawing = assembly, drawing

    @staticmethod
    def load(start: PretrainConfig, step: int, process: Process, drawing: Drawing) -> "Reference":
        """A step of the run alignment started from; a collective call.

        Raises: CheckpointError if the run does not have it any more.
        """
        assembly = assemble(start, process)
        load_weights(CheckpointReader(Storage(f"{start.run_dir}/{CHECKPOINTS}"), step), assembly)
        return Reference(assembly, drawing)

    @torch.no_grad()
    def log_probabilities(self, prompts: SequenceBatch, paths: Jagged) -> Jagged:
        """As completions are drawn; a collective call. Shapes: paths [B * G, L], G rows per user."""
        model, device = self.assembly.model, self.assembly.process.device
        rows = self.assembly.lookup()(model.prompt_ids(prompts))
        by_user = paths.values.unflatten(0, (prompts.num_users, self.drawing.group_size)).to(device)
        with evaluating(model), self.drawing.autocast(device):
            found = self.drawing.log_probabilities(model, rows, prompts.to(device), by_user)
        return paths.with_values(found.flatten(0, 1).cpu())
