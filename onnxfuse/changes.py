"""The change itself: groups are fused, in the bodies too, and the layers behind them are fitted anew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxfuse.bodies import Bodies, Commands, compress_bodies
from onnxfuse.calibration.activations import observe_activations
from onnxfuse.calibration.batches import for_samples
from onnxfuse.calibration.mixtures import with_mixtures
from onnxfuse.calibration.reconstruct import Reconstruction, reconstruct_network
from onnxfuse.calibration.refit import Refit, refit_network
from onnxfuse.gradient import choose_loss
from onnxfuse.graph.view import GraphView
from onnxfuse.importance import FROM_SAMPLES
from onnxfuse.preparation import Clock, Prepared
from onnxfuse.proof.samples import Samples
from onnxfuse.refusals import refuse_nothing
from onnxfuse.stages import Fused, fuse_groups
from onnxfuse.statistics.features import ActivationFeatures

__all__ = ["Changed", "Fusing", "fit", "fuse"]


@dataclass(frozen=True, eq=False)
class Fusing:
    """What fusing the groups gave.

    Attributes:
        fused: The weights, and how they were found.
        bodies: What became of the bodies of If, Loop and Scan.
        note: What else a reader should know; empty if there is nothing.
    """

    fused: Fused
    bodies: Bodies
    note: str


@dataclass(frozen=True, eq=False)
class Changed:
    """The network with other weights.

    Attributes:
        fusing: What was fused.
        refits: What the refit did.
        reconstructions: What the reconstruction did.
    """

    fusing: Fusing
    refits: Sequence[Refit]
    reconstructions: Sequence[Reconstruction]


def fuse(prepared: Prepared, clock: Clock, commands: Commands) -> Fusing:
    """Fuse the groups, in the bodies too.

    Args:
        prepared: What is known, and how many channels each group keeps.
        clock: Told of every stage.
        commands: What to do with bodies.

    Raises:
        OnnxFuseError: One of its subclasses, as for `onnxfuse.compress`.
    """
    analysis, config = prepared.analysis, prepared.config
    bodies = _change_bodies(prepared, clock, commands)
    activations, note = _activations(prepared, clock)
    with clock.stage("fuse") as step:
        fused = fuse_groups(analysis, prepared.plans, prepared.judgements, activations, config, step)
    return Fusing(fused, bodies, note)


def fit(prepared: Prepared, fusing: Fusing, clock: Clock) -> Changed:
    """Fit what is behind fused channels.

    Args:
        prepared: What is known.
        fusing: What was fused; its weights change.
        clock: Told of every stage.

    Raises:
        OnnxFuseError: One of its subclasses, as for `onnxfuse.compress`.
    """
    samples = prepared.runs
    if prepared.config.refits:
        samples = with_mixtures(prepared.analysis, samples, prepared.config.seed)
    refits = _refit(prepared, fusing.fused, samples, clock)
    return Changed(fusing, refits, _reconstruct(prepared, fusing.fused, samples, clock))


def _change_bodies(prepared: Prepared, clock: Clock, commands: Commands) -> Bodies:
    """Compress the bodies; refuse a run that has then changed nothing."""
    if not prepared.bodies.results:
        return prepared.bodies
    analysis, config = prepared.analysis, prepared.config
    with clock.stage("bodies"):
        bodies = compress_bodies(analysis, prepared.samples, prepared.bodies_config, prepared.wanted, commands)
        refuse_nothing(analysis, prepared.plans, bodies, config)
    return bodies


def _activations(prepared: Prepared, clock: Clock) -> tuple[Mapping[str, ActivationFeatures], str]:
    """Observe what the importance wants to know of the groups whose map it decides; say what a reader should know."""
    config, samples, analysis = prepared.config, prepared.runs, prepared.analysis
    name, loss, note = config.fusion.importance, None, ""
    if name not in FROM_SAMPLES:
        return {}, ""
    with clock.stage("importance"):
        shrinking = [plan.group for plan in prepared.plans if plan.kept < plan.group.channels]
        groups = [group for group in shrinking if not (config.is_auto and group.name in prepared.judgements)]
        if groups and name == "taylor":
            graph = GraphView(for_samples(analysis.graph.model, samples))
            loss = choose_loss(graph, samples, config.provider, prepared.labels)
            note = f"the importance taylor goes by the gradient of {loss.words}"
        return observe_activations(analysis, groups, name, samples, config.provider, config.seed, loss), note


def _refit(prepared: Prepared, fused: Fused, samples: Samples, clock: Clock) -> list[Refit]:
    """Fit the layers behind fused channels anew, one by one, if that is asked for."""
    config = prepared.config
    if not config.refits:
        return []
    with clock.stage("refit") as step:
        return refit_network(prepared.analysis, fused.state, fused.applied, samples, config.provider, config.seed, step)


def _reconstruct(prepared: Prepared, fused: Fused, samples: Samples, clock: Clock) -> list[Reconstruction]:
    """Fit parts of the network as a whole, if that is asked for, and then once more the layers in which they end."""
    analysis, config = prepared.analysis, prepared.config
    if not config.refits or config.effort == 0:
        return []
    with clock.stage("reconstruct") as step:
        found = reconstruct_network(
            analysis, fused.state, fused.applied, samples, config, step, is_made_up=prepared.is_made_up
        )
    if any(segment.steps for segment in found):
        # Each layer was fitted to what came before a segment in front of it changed. Inside a segment there is no
        # target any more, but at its end there is.
        ends = {segment.value for segment in found}
        with clock.stage("refit ends") as step:
            refit_network(analysis, fused.state, fused.applied, samples, config.provider, config.seed, step, ends)
    return found
