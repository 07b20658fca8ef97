"""Training that survives being killed at any moment."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rq.training.files import to_disk, write_atomically

_STATE = "backup.json"
_WEIGHTS = "epoch-{epoch}.weights.h5"
_OF_KERAS = "latest.weights.h5"


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """Backs a training up after every epoch, so that at any moment one backup is whole.

    Keras's callback of this name writes over its only file, and says in a second one which epoch
    that belongs to: a process killed meanwhile leaves a file that cannot be read, or repeats an
    epoch unnoticed. This one writes the weights beside those of the epoch before, and a backup
    counts from the moment at which one small file is replaced, which the file system does at once.

    What is backed up is what `Model.save_weights` writes (weights, what quantizers and schedules
    learn or count, the optimizer) and what it leaves out: the states of random generators, as those
    of dropout. A script that was killed is started
    again as it is: it builds, quantizes, calibrates and compiles the model as before, and `fit`
    goes on with the epoch that was not finished. The callbacks of this package go on where they
    were, in whatever order they are listed.

    Final weights are those of a training that nothing interrupted if every epoch sees the same
    batches, too. With `shuffle=True`, its default, `fit` draws their order from a generator that a
    new process starts anew: pass `shuffle=False`, and let the order follow from the number of the
    epoch, as in the example.

    Args:
        backup_dir: folder of the backup, of one training alone.
        delete_checkpoint: whether to delete it when the training is complete.

    Raises:
        ValueError: when `fit` begins: the model is not built, the folder holds a backup of Keras's
            callback, or one whose optimizer is another or that has other random generators.

    Example:

    >>> import keras, numpy as np, tempfile, keras_rq as rq
    >>> class Batches(keras.utils.PyDataset):
    ...     epoch = 0
    ...     def __len__(self):
    ...         return 4
    ...     def __getitem__(self, index):
    ...         order = np.random.default_rng([0, self.epoch]).permutation(32)
    ...         rows = order[8 * index : 8 * index + 8]
    ...         return np.eye(32)[rows], np.arange(32.0)[rows, None]
    >>> data, backup = Batches(), tempfile.mkdtemp()
    >>> tell = keras.callbacks.LambdaCallback(on_epoch_begin=lambda e, _: setattr(data, "epoch", e))
    >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> callbacks = [tell, rq.callbacks.BackupAndRestore(backup)]
    >>> _ = model.fit(data, epochs=2, callbacks=callbacks, shuffle=False, verbose=0)
    """

    def __init__(self, backup_dir: str | Path, *, delete_checkpoint: bool = True) -> None:
        super().__init__(str(backup_dir), delete_checkpoint=delete_checkpoint)
        self._folder = Path(backup_dir)

    def on_train_begin(self, logs: Any = None) -> None:
        self._check()
        backup = self._read()
        if backup is None:
            return
        epoch = int(backup["epoch"])
        optimizer = self.model.optimizer
        if optimizer is not None and not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        with warnings.catch_warnings():
            # Keras goes on without the optimizer's state, and so with other numbers.
            skipping = "Skipping variable loading for optimizer"
            warnings.filterwarnings("error", skipping)
            try:
                self.model.load_weights(self._folder / _WEIGHTS.format(epoch=epoch))
            except (UserWarning, ValueError) as problem:
                if skipping not in str(problem):
                    raise
                raise ValueError(
                    f"The backup in {str(self._folder)!r} is of a training with another optimizer. "
                    "Compile the model as it was, or use another `backup_dir`. Received: "
                    f"{problem}"
                ) from None
        self._seed(backup["seeds"])
        # As Keras's callback does: the loop reads it after `on_train_begin`.
        self.model._initial_epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Nothing: a backup within an epoch would let its batches be seen twice."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        done = epoch + 1
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / _WEIGHTS.format(epoch=done)
        self.model.save_weights(path, overwrite=True)
        to_disk(path)
        seeds = [ops.convert_to_numpy(state).tolist() for state in self._seeds()]
        state = json.dumps({"epoch": done, "seeds": seeds})
        write_atomically(self._folder / _STATE, state.encode())
        to_disk(self._folder)
        for other in self._folder.glob(_WEIGHTS.format(epoch="*")):
            if other != path:
                other.unlink()

    def on_train_end(self, logs: Any = None) -> None:
        self.model._initial_epoch = None  # else the next `fit` would leave epochs out, too
        if self.delete_checkpoint and self._folder.exists():
            # First what makes it a backup: what a kill leaves of the rest is then none.
            (self._folder / _STATE).unlink(missing_ok=True)
            shutil.rmtree(self._folder)

    def _check(self) -> None:
        if not self.model.built:
            raise ValueError(
                f"Model {self.model.name!r} is not built, so that no backup can be restored. Call "
                "it on a batch of data, or `model.build(input_shape)`, before `fit`."
            )
        if (self._folder / _OF_KERAS).exists():
            raise ValueError(
                f"`backup_dir` holds a backup of keras.callbacks.BackupAndRestore, {_OF_KERAS!r}. "
                f"Finish that training with it, or use another folder. Received: {self._folder}"
            )

    def _read(self) -> dict[str, Any] | None:
        """How many epochs are backed up, and the seeds; None without a backup."""
        try:
            return json.loads((self._folder / _STATE).read_text())
        except FileNotFoundError:
            return None

    def _seeds(self) -> list[Any]:
        """States of the random generators of all layers; Keras's files leave them out."""
        states: dict[int, Any] = {}
        for layer in self.model._flatten_layers():
            for generator in layer._seed_generators:
                states.setdefault(id(generator), generator.state)
        return list(states.values())

    def _seed(self, saved: list[Any]) -> None:
        states = self._seeds()
        if len(states) != len(saved):
            raise ValueError(
                f"The backup in {str(self._folder)!r} is of a model with {len(saved)} random "
                f"generators. Received: one with {len(states)}. Make the model as it was, or use "
                "another `backup_dir`."
            )
        for state, value in zip(states, saved, strict=True):
            state.assign(np.asarray(value, keras.backend.standardize_dtype(state.dtype)))
