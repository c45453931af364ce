"""Sets up a run: claims its folder, opens its data, and restores or initializes its state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from disco_jax.config.validation import check_division
from disco_jax.data.source import Joined
from disco_jax.data.sources import open_source
from disco_jax.errors import UserError
from disco_jax.interop.convert import resize_positions, resize_text_positions
from disco_jax.interop.transfer import read_model
from disco_jax.mesh import make_mesh
from disco_jax.models import CLIPConfig
from disco_jax.models.build import model_config
from disco_jax.models.folder import flatten, nest
from disco_jax.processes.backend import first_then_all
from disco_jax.runs import agreement
from disco_jax.runs import workdir as workdir_lib
from disco_jax.runs.home import Home, RunCheckpoints
from disco_jax.runs.places import run_place
from disco_jax.step.optimizer import make_optimizer
from disco_jax.step.state import TrainState, abstract_state, init_state, trained
from disco_jax.storage.urls import Place
from disco_jax.training.length import check_length, with_steps
from disco_jax.training.text_groups import find_text_groups


class Setup(NamedTuple):
    """A run that is ready to train."""

    config: ConfigDict  # the run's, with the steps of num_epochs and the groups of `auto`
    model: CLIPConfig
    mesh: Mesh
    source: Joined
    checkpoints: RunCheckpoints
    state: TrainState
    position: dict[str, Any]  # data position from the checkpoint; empty for a new run


RESIZED = {
    "visual/positional_embedding": resize_positions,
    "text/positional_embedding": resize_text_positions,
}


def set_up(config: ConfigDict, home: Home) -> Setup:
    """Opens everything a run needs. The first process goes first and creates what others read.

    Raises:
      UserError: if there is a problem with the config, data, workdir or checkpoint.
    """
    check_division(config, jax.device_count())
    mesh, model = make_mesh(fsdp=config.fsdp), model_config(config)
    source = first_then_all(lambda: open_source(config.data, config.data.name, config.data.split))
    config = with_steps(config, len(source))
    workdir = home.folder
    if not (workdir / "config.json").exists():  # a run that has started keeps its length
        check_length(config, source)
    text_groups = find_text_groups(config, model.text, source)
    if jax.process_index() == 0:
        workdir_lib.claim(config, workdir, home.name)
        devices = [device.device_kind for device in jax.devices()]
        workdir_lib.record(
            config,
            workdir,
            devices=devices,
            processes=jax.process_count(),
            samples=len(source),
            text_groups=text_groups,
        )
    home.publish()
    config = config.copy_and_resolve_references()
    config.model.text_groups = text_groups
    checkpoints = home.checkpoints(config.checkpoint_keep)
    state, position = _restore_or_init(config, model, mesh, checkpoints)
    return Setup(config, model, mesh, source, checkpoints, state, position)


def _restore_or_init(
    config: ConfigDict,
    model: CLIPConfig,
    mesh: Mesh,
    checkpoints: RunCheckpoints,
) -> tuple[TrainState, dict[str, Any]]:
    optimizer = make_optimizer(config)
    newest = checkpoints.latest_step()
    # A network file system may show the other processes an older list.
    step = agreement.of_first("" if newest is None else str(newest))
    if step:
        return checkpoints.restore(abstract_state(model, optimizer, mesh), int(step))
    state = init_state(model, optimizer, mesh, config.seed)
    if config.init_from:
        state = begin_from(run_place(config.init_from, "init_from"), model, state)
    return state, {}


def begin_from(source: Place, model: CLIPConfig, state: TrainState) -> TrainState:
    """Returns `state` with the parameters of a model folder or a run; shardings stay.

    Positions are interpolated if the models differ in the sizes of their inputs.

    Raises:
      UserError: if they belong to a different model. The message names the field or parameter.
    """
    origin, params = read_model(source)
    for theirs, ours in ((origin.vision, model.vision), (origin.text, model.text)):
        for field in ("activation", "norm_eps", "pool"):
            there, here = getattr(theirs, field), getattr(ours, field)
            if there != here:
                raise UserError(
                    f"init_from: {source} has {field} {there}, but this model has {here}; "
                    f"--config.model.name={source} adopts its whole configuration"
                )
    given, wanted = flatten(params), flatten(state.params)
    if ("logit_bias" in given) != ("logit_bias" in wanted):
        kind = "sigmoid" if "logit_bias" in given else "softmax"
        raise UserError(f"init_from: {source} was trained with loss.kind = {kind}")
    for name in sorted(given.keys() ^ wanted.keys()):
        where = "missing from it" if name in wanted else "not in this model"
        raise UserError(
            f"init_from: {source} is a different model ({name} is {where}); check model.name"
        )
    for name, resize in RESIZED.items():
        given[name] = resize(np.asarray(given[name]), len(wanted[name]))
    for name, leaf in wanted.items():
        if given[name].shape != leaf.shape:
            raise UserError(
                f"init_from: {source} is a different model ({name} has shape {given[name].shape} "
                f"there and {leaf.shape} here); check model.name"
            )
    placed = {name: jax.device_put(given[name], leaf.sharding) for name, leaf in wanted.items()}
    params = nest(placed)
    opt_state = state.opt_state
    if optax.tree.get(opt_state, "average") is not None:  # begins there too, in arrays of its own
        average = jax.tree.map(jnp.copy, trained(model, params))
        opt_state = optax.tree.set(opt_state, average=average)
    return state._replace(params=params, opt_state=opt_state)
