"""Several devices behind one option: each backend's own engine around `model.fit`.

`keras.distribution.DataParallel` on JAX, `tf.distribute.MirroredStrategy` on TensorFlow
and `torch.nn.parallel.DistributedDataParallel` on PyTorch. Each device has the whole
net and a part of each batch, and the steps are those that one device would make:

```python
def train():
    model = keras_fcn.FCN8s("googlenet", num_classes=3)
    keras_fcn.compile_modern(model, steps)
    devices.distribute(model)
    batches = Batches(source, batch_size=8, shard=devices.shard())
    model.fit(devices.fill(batches), epochs=60, shuffle=False)
    if devices.is_first():
        keras_fcn.save_checkpoint(model, "model.h5", facts=facts)


if __name__ == "__main__":
    devices.run(train, 2)
```

The engine is asked how many devices there are, so all of this works as well under one
that was set up otherwise, for several machines.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time

import keras
import numpy as np
from keras import tree

from keras_fcn.labels import VOID

# Seconds for the processes to end by themselves once one has, and again after SIGTERM.
GRACE = 5

# Between the seeds of two processes: steps until one repeats what another has drawn.
SEEDS_APART = 10_000_019


def run(function, number, *arguments):
    """Calls a function whose trainings are to use several devices of this machine.

    On JAX and TensorFlow it is called here. On PyTorch it is called in `number` new
    processes, one a device: it must be importable, and a script that calls `run` needs
    `if __name__ == "__main__":`, as everywhere with `multiprocessing`. All of them
    stop when one dies; those that are not the first print nothing. A signal to stop
    (SIGINT, SIGTERM) is passed on to the first, which may save before it ends. Under
    `torchrun`, which starts processes itself, it is called here, too.

    Args:
        function: Builds, compiles and fits.
        number: How many devices. Those of a GPU's kind if there are any, else of a
            CPU's. With 1 no engine is used.
        arguments: Passed on; on PyTorch they are pickled.

    Returns:
        What the function returns; on PyTorch, from several devices, None.

    Raises:
        ValueError: If there are not so many devices, or the function raises it.
        OSError: If a process was killed, or the function raises it.
    """
    torch = keras.backend.backend() == "torch"
    if number < 1:
        raise ValueError(f"{number} devices were asked for; expected 1 or more.")
    if torch and "LOCAL_WORLD_SIZE" in os.environ:
        return _run_under_torchrun(function, number, arguments)
    if number == 1:
        return function(*arguments)
    if torch:
        return _run_processes(function, number, arguments)
    jax = keras.backend.backend() == "jax"
    with (_jax_engine if jax else _tensorflow_engine)(number).scope():
        return function(*arguments)


def count():
    """Returns how many devices share each batch, on all machines; 1 without engine."""
    backend = keras.backend.backend()
    if backend == "torch":
        return shard()[1]
    if backend == "jax":
        distribution = keras.distribution.distribution()
        return distribution.device_mesh.devices.size if distribution else 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def shard():
    """Returns which part of each batch this process is to read: (rank, processes).

    The part is every `processes`-th picture, from number `rank`. What a process has
    read, JAX deals out to its own devices; TensorFlow, to those of all machines.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        import torch.distributed

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if backend == "jax":
        import jax

        return jax.process_index(), jax.process_count()
    return 0, 1


def is_first():
    """Returns whether this process is the one that writes files and shows progress."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.distribute.get_strategy().extended.should_checkpoint
    return shard()[0] == 0


def share(batch_size):
    """Returns how many pictures of a batch each device gets.

    Args:
        batch_size: Pictures of a batch, of all devices together.

    Raises:
        ValueError: If they do not divide.
    """
    pictures, rest = divmod(batch_size, count())
    if rest or not pictures:
        raise ValueError(
            f"A batch of {batch_size} was given for {count()} devices; expected equal "
            f"shares: make it {max(pictures, 1) * count()}, say."
        )
    return pictures


def fill(batches):
    """Fills batches up with void pictures until they divide among the devices.

    A batch that does not divide is an error on JAX, and on TensorFlow an error or a
    wrong mean. The last one of an epoch often does not, nor do single pictures of all
    sizes, as in a validation. Void pictures change neither gradients nor scores.

    Args:
        batches: A `keras.utils.PyDataset` of (pictures, labels), or of dicts of them.

    Returns:
        Another one, or the same if there is nothing to fill: on PyTorch, and on one
        device.
    """
    here = count() // shard()[1]  # devices that this process deals out to
    return batches if here == 1 else _Filled(batches, here)


class _Filled(keras.utils.PyDataset):
    def __init__(self, batches, multiple):
        super().__init__()
        self.batches, self.multiple = batches, multiple

    @property
    def num_batches(self):
        return self.batches.num_batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        pictures, labels = self.batches[index]
        missing = -len(tree.flatten(labels)[0]) % self.multiple
        return (
            tree.map_structure(lambda x: _extended(x, missing, 0), pictures),
            tree.map_structure(lambda x: _extended(x, missing, VOID), labels),
        )

    def on_epoch_begin(self):
        self.batches.on_epoch_begin()

    def on_epoch_end(self):
        self.batches.on_epoch_end()


def _extended(array, number, value):
    more = np.full((number, *array.shape[1:]), value, array.dtype)
    return np.concatenate([array, more]) if number else array


def wait():
    """Waits until all processes have come here, as for a file that the first writes."""
    if keras.backend.backend() == "torch" and count() > 1:
        import torch.distributed

        torch.distributed.barrier()


def mean(value):
    """Returns the mean of a tensor over the devices, for what a loss divides by.

    On JAX a loss sees the whole batch anyway, on the others one device's part of it.

    Args:
        value: A tensor, of which no gradient is wanted.
    """
    backend = keras.backend.backend()
    if count() == 1 or backend == "jax":
        return value
    if backend == "tensorflow":
        import tensorflow as tf

        replica = tf.distribute.get_replica_context()  # None where Keras builds
        return replica.all_reduce("MEAN", value) if replica else value
    return _sum_over_processes(value) / count()


def distribute(model):
    """Makes the steps of `model.fit` those that one device would make.

    JAX does so by itself. On TensorFlow gradients are summed before the optimizer
    sees them: Keras (3.15) clips each device's own, and cannot accumulate them. On
    PyTorch the training pass goes through `DistributedDataParallel`, a loss with
    `reduction="sum"` is summed over the devices, not averaged, and so are the counts
    of metrics, in `fit` and `evaluate`: all processes must call both. Each device has
    masks of its own from Dropout. To do it twice changes nothing.

    Args:
        model: Built, compiled and frozen where it is to be.
    """
    if count() == 1 or keras.backend.backend() == "jax":
        return
    if "call" in vars(model):  # it is done
        return
    if keras.backend.backend() == "tensorflow":
        _draw_own_masks(model)
        _sum_gradients_first(model.optimizer)
        _predict_once(model)
    else:
        _draw_own_masks(model)
        _sum_losses(model)
        _sum_metrics(model)
        _pass_through_ddp(model)


def _draw_own_masks(model):
    """Shifts the seeds while the net is called: their state stays that of the first."""
    call = model.call
    seeds = [  # each of two numbers: the seed, and how often it was drawn from
        variable
        for variable in model.non_trainable_variables
        if variable.name == "seed_generator_state"
    ]

    def shifted_call(*inputs, **options):
        shift = _device() * SEEDS_APART
        for seed in seeds:
            seed.assign_add([shift, 0])
        outputs = call(*inputs, **options)
        for seed in seeds:
            seed.assign_sub([shift, 0])
        return outputs

    model.call = shifted_call


def _device():
    """Returns which of the devices that share a batch is at work."""
    if keras.backend.backend() == "torch":
        return shard()[0]
    import tensorflow as tf

    replica = tf.distribute.get_replica_context()  # None where Keras builds
    return replica.replica_id_in_sync_group if replica else 0


# JAX and TensorFlow


def _jax_engine(number):
    found = keras.distribution.list_devices()
    _check(
        number,
        found,
        "Before Python starts, set XLA_FLAGS=--xla_force_host_platform_device_count="
        f"{number} to make several of one CPU.",
    )
    return keras.distribution.DataParallel(devices=found[:number])


def _tensorflow_engine(number):
    import tensorflow as tf

    found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices(
        "CPU"
    )
    found = [device.name for device in found]
    _check(
        number,
        found,
        "tf.config.set_logical_device_configuration makes several of one.",
    )
    return tf.distribute.MirroredStrategy(found[:number])


def _check(number, found, remedy):
    if number > len(found):
        raise ValueError(
            f"{number} devices were asked for; expected at most {len(found)}, as "
            f"{keras.backend.backend()} finds {', '.join(map(str, found))}. {remedy}"
        )


def _sum_gradients_first(optimizer):
    import tensorflow as tf

    apply = optimizer.apply

    def apply_sums(gradients, variables):
        replica = tf.distribute.get_replica_context()
        apply(replica.all_reduce("SUM", list(gradients)), variables)

    optimizer.apply = apply_sums
    # Equal sums on all devices: each can do what Keras does without tf.distribute.
    (own,) = [
        c for c in type(optimizer).__mro__ if "_all_reduce_sum_gradients" in vars(c)
    ]
    for name in (
        "_apply_weight_decay",
        "_backend_increment_gradient_accumulators",
        "_backend_update_step",
    ):
        setattr(optimizer, name, getattr(super(own, optimizer), name))


def _predict_once(model):
    predict_on_batch = model.predict_on_batch

    def first_copy(x):
        # Each device gets the whole batch; Keras (3.15) puts their answers in a row.
        size = len(tree.flatten(x)[0])
        return tree.map_structure(lambda y: y[:size], predict_on_batch(x))

    model.predict_on_batch = first_copy


# PyTorch


def _run_processes(function, number, arguments):
    import torch

    gpus = torch.cuda.device_count()
    if gpus:
        names = [torch.cuda.get_device_name(i) for i in range(gpus)]
        _check(number, names, "Ask for fewer.")
    # The processes meet here; port 0 is one that is free.
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
    context = torch.multiprocessing.spawn(
        _process,
        (number, store.port, errors, function, arguments),
        nprocs=number,
        join=False,
    )
    _wait(context, errors)


def _process(rank, number, port, errors, function, arguments):
    """The life of one of the new processes."""
    import torch

    if os.name == "posix":
        os.setpgrp()  # Ctrl-C reaches the parent alone, which passes it on once
    if rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when the first does
    threading.Thread(target=_end_with_parent, args=(rank,), daemon=True).start()
    # As torchrun sets them, for libraries that look there.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    silent = contextlib.ExitStack()
    if rank:
        nowhere = silent.enter_context(open(os.devnull, "w"))
        silent.enter_context(contextlib.redirect_stdout(nowhere))
        silent.enter_context(contextlib.redirect_stderr(nowhere))
    with silent, _group(rank, store=store, rank=rank, world_size=number):
        try:
            function(*arguments)
        except (ValueError, OSError) as error:
            errors.put(error)
            raise
        except KeyboardInterrupt:  # which torch takes for a good end
            sys.exit(128 + signal.SIGINT)


def _end_with_parent(rank):
    # torch sends SIGINT then, which is ignored where a shell does not wait for it.
    multiprocessing.parent_process().join()
    time.sleep(GRACE if rank else 0)  # the first may save
    os.kill(os.getpid(), signal.SIGTERM)


def _run_under_torchrun(function, number, arguments):
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if number not in (1, here):
        raise ValueError(
            f"{number} devices were asked for, but torchrun started {here} processes "
            "on this machine; expected the same."
        )
    with _group(int(os.environ["LOCAL_RANK"])):
        return function(*arguments)


@contextlib.contextmanager
def _group(device, **meeting):
    import torch

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if gpu else "gloo", **meeting)
    yield
    torch.distributed.destroy_process_group()  # an error must not wait for the others


def _wait(context, errors):
    """Waits for all processes, and says why if one failed."""
    import torch

    received = []

    def pass_on(number, frame):
        received.append(number)
        os.kill(context.pids()[0], number)

    failures = (
        torch.multiprocessing.ProcessRaisedException,
        torch.multiprocessing.ProcessExitedException,
    )
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        while not context.join(grace_period=GRACE):
            pass
    except failures as error:
        if received and received[0] == signal.SIGINT:
            raise KeyboardInterrupt from None
        if received:
            sys.exit(128 + received[0])
        if not errors.empty():
            raise errors.get() from None
        signals = [-p.exitcode for p in context.processes if p.exitcode < 0]
        if signals:  # of which SIGTERM may have been to end those that were left
            first = min(signals, key=lambda number: number == signal.SIGTERM)
            raise OSError(
                f"A process of {len(context.processes)} was ended by "
                f"{signal.Signals(first).name}, and so the others had to stop. Was the "
                "memory full?"
            ) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_through_ddp(model):
    import torch

    call = model.call

    class Net(torch.nn.Module):
        """What Keras' trainer calls, without the trainer."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *inputs, **options):
            return call(*inputs, **options)

    device = model.trainable_variables[0].value.device
    parallel = torch.nn.parallel.DistributedDataParallel(
        Net(),
        device_ids=[device] if device.type == "cuda" else None,
    )

    def parallel_call(*inputs, training=None, **options):
        net = parallel if training and torch.is_grad_enabled() else call
        return net(*inputs, training=training, **options)

    model.call = parallel_call


def _sum_losses(model):
    """Makes up for the mean over the processes that DistributedDataParallel takes."""
    for loss in tree.flatten(model.loss):
        if getattr(loss, "reduction", None) == "sum" and "call" not in vars(loss):
            loss.call = _times(count(), loss.call)


def _times(number, loss):
    import torch

    def summed(*inputs):
        # Without gradients it is a validation, which each process makes by itself.
        return loss(*inputs) * (number if torch.is_grad_enabled() else 1)

    return summed


def _sum_metrics(model):
    import torch

    get_metrics_result = model.get_metrics_result

    def result_of_all():
        variables = model.metrics_variables
        counts = [variable.value for variable in variables]
        if any(tensor.is_meta for tensor in counts):  # Keras builds
            return get_metrics_result()
        flat = torch.cat([tensor.double().reshape(-1) for tensor in counts])
        sums = _sum_over_processes(flat).split([tensor.numel() for tensor in counts])
        for variable, value in zip(variables, sums, strict=True):
            variable.assign(value.reshape(variable.shape))
        result = tree.map_structure(keras.ops.copy, get_metrics_result())
        if not is_first():  # which keeps what all have counted so far
            for variable in variables:
                variable.assign(torch.zeros_like(variable.value))
        return result

    model.get_metrics_result = result_of_all


def _sum_over_processes(tensor):
    import torch

    if tensor.is_meta:  # Keras builds
        return tensor
    total = tensor.detach().clone()
    torch.distributed.all_reduce(total)
    return total
