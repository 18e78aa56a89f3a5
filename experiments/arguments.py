"""Options of the training command."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import configs
from experiments.configs import BatchNormFold, Dtype
from experiments.optimization import Schedule
from experiments.processes import Connection

_CONFIGS = "(default: the config's)"
_Text = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint=_CONFIGS)]
_Int = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_CONFIGS)]
_Float = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_CONFIGS)]
_Schedule = Annotated[Schedule | None, tyro.conf.arg(help_behavior_hint=_CONFIGS)]
_Dtype = Annotated[Dtype | None, tyro.conf.arg(help_behavior_hint=_CONFIGS)]
_BnFold = Annotated[
    BatchNormFold | None,
    tyro.conf.arg(metavar="{none,one_conv,two_conv}", help_behavior_hint=_CONFIGS),
]
_PhaseName = Literal["float", "qat", "qat_finetune"]
_Phases = Annotated[
    tuple[_PhaseName, ...] | None,
    tyro.conf.arg(
        metavar="{float,qat,qat_finetune} ...",
        help_behavior_hint="(default: all; without float with --float-checkpoint)",
    ),
]
_Path = Annotated[
    str | None,
    tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: this run's float phase)"),
]
_Rules = Annotated[str | None, tyro.conf.arg(metavar="JSON", help_behavior_hint=_CONFIGS)]
_Settings = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]],
    tyro.conf.arg(
        name="set",
        metavar="FIELD=VALUE",
        help="A field of the SimQATConfig, again and again: weight_bits=4, "
        "activation.observer=mse, exclude='[\"head\"]'.",
    ),
]
_Steps = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: none)")]
_Mesh = Annotated[
    str | None,
    tyro.conf.arg(metavar="STR", help_behavior_hint="(default: all devices on the axis data)"),
]
_NoText = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="(default: none)")]
_Name = Annotated[
    str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="(default: CONFIG-DATA-seedSEED)")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the command; what is not given is the config's."""

    config: Annotated[str, tyro.conf.arg(help=f"Experiment to run: {', '.join(configs.CONFIGS)}.")]
    phases: _Phases = None
    """Phases to train; what the run holds already is kept."""
    data: _Text = None
    """Data set: mnist, cifar10 or imagenet2012 (through tensorflow-datasets), or mnist5k
    (installed already)."""
    epochs: _Int = None
    """Epochs of the phases float and qat."""
    finetune_epochs: _Int = None
    """Epochs of the phase qat_finetune."""
    batch_size: _Int = None
    """Images in a training batch."""
    learning_rate: _Float = None
    """Highest learning rate of the phases float and qat."""
    finetune_learning_rate: _Float = None
    """Highest learning rate of the phase qat_finetune."""
    step_learning_rate: _Float = None
    """Highest learning rate of learned steps."""
    schedule: _Schedule = None
    """How the learning rate falls."""
    warmup_epochs: _Int = None
    """Epochs in which the learning rate rises; none in qat_finetune."""
    weight_decay: _Float = None
    """L2 on kernels."""
    label_smoothing: _Float = None
    """Share of the target spread over all classes."""
    dtype: _Dtype = None
    """Of the computation; parameters stay float32."""
    recipe: Path | None = None
    """File of the SimQATConfig of the SimQAT phases, as SimQATConfig.to_json writes it, or
    config.json or results.json of a run."""
    rules: _Rules = None
    """Rules in the place of the recipe's, as JSON or a file of it:
    '[{"path": "head", "weight": {"num_bits": 8}}]'."""
    settings: _Settings = ()
    bn_fold: _BnFold = None
    """How BatchNorm is folded in the SimQAT phases."""
    freeze_bn_epoch: _Int = None
    """Epochs of a SimQAT phase after which BatchNorm's statistics are frozen."""
    float_checkpoint: _Path = None
    """Start qat_finetune from another run's float phase: the run, its float directory, or one
    checkpoint in it."""
    seed: _Int = None
    """Seed of the first parameters, the order of the images and their augmentation."""
    steps_per_dispatch: _Int = None
    """Training steps in one compiled loop; 1 is fastest on CPU."""
    accumulate: _Int = None
    """Parts that a batch is computed in, for less memory."""
    mesh: _Mesh = None
    """Devices: data=8, or data=4,model=2."""
    distributed: bool = False
    """Train with the other processes that Slurm, Open MPI, Kubernetes or a TPU pod has started."""
    coordinator: _NoText = None
    """HOST:PORT of process 0, where nothing else names it."""
    num_processes: _Steps = None
    """Number of processes, with --coordinator."""
    process_id: _Steps = None
    """Number of this process, from 0, with --coordinator."""
    connect_timeout: int = 300
    """Seconds in which all processes must have come."""
    workers: int = 0
    """Processes that decode a streamed data set (imagenet2012); 0: this one."""
    name: _Name = None
    """Name of the run's directory."""
    runs_dir: Path = Path("runs")
    """Directory of all runs."""
    resume: bool = False
    """Continue a run that was stopped, bit for bit as if it had not been."""
    checkpoint_every: _Steps = None
    """Steps between checkpoints, besides the one after every epoch."""
    keep: int = 2
    """Newest checkpoints kept of each phase."""
    tensorboard: bool = False
    """Write losses, accuracies and ranges for TensorBoard (extra tensorboard)."""

    def connection(self) -> Connection | None:
        """Return how to find the other processes, None where there are none.

        Raises:
          ExperimentError: half of what is needed.
        """
        by_hand = (self.coordinator, self.num_processes, self.process_id)
        if not self.distributed and by_hand == (None, None, None):
            return None
        return Connection(
            coordinator=self.coordinator,
            count=self.num_processes,
            index=self.process_id,
            timeout=self.connect_timeout,
        )
