"""ldm.config: merging, translation of published YAML, checks and construction."""

import inspect
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from ldm import config as config_module
from ldm.cli import Share
from ldm.config import (
    get_obj_from_str,
    instantiate_from_config,
    load_configs,
    require_own_targets,
    resolve,
    upgrade_config,
    validate_config,
)
from ldm.errors import UserError
from ldm.legacy import LEGACY_TARGETS, UNSUPPORTED_TARGETS, UNUSED

ROOT = Path(__file__).resolve().parents[1]

# The settings of the two published training files, with the target names used there.
PUBLISHED_AUTOENCODER = """
model:
  base_learning_rate: 4.5e-6
  target: ldm.models.autoencoder.AutoencoderKL
  params:
    monitor: val/rec_loss
    embed_dim: 3
    ddconfig: {double_z: true, z_channels: 3, resolution: 256, in_channels: 3, out_ch: 3, ch: 128,
               ch_mult: [1, 2, 4], num_res_blocks: 2, attn_resolutions: [], dropout: 0.0}
    lossconfig:
      target: ldm.modules.losses.LPIPSWithDiscriminator
      params: {disc_start: 50001, kl_weight: 1.0e-6, disc_weight: 0.5}
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 6
    wrap: true
    train: {target: ldm.data.histo.HistoTrain, params: {size: 256}}
lightning:
  callbacks:
    image_logger:
      target: main.ImageLogger
      params: {batch_frequency: 1000, max_images: 8, increase_log_steps: true}
  trainer: {benchmark: true, accumulate_grad_batches: 2}
"""
PUBLISHED_DIFFUSION = """
model:
  base_learning_rate: 5.0e-5
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    timesteps: 1000
    linear_start: 0.0015
    linear_end: 0.0155
    num_timesteps_cond: 1
    log_every_t: 200
    loss_type: l1
    image_size: 64
    channels: 3
    first_stage_key: image
    cond_stage_key: image
    cond_stage_trainable: false
    cond_stage_config: __is_unconditional__
    concat_mode: false
    scale_by_std: true
    monitor: val/loss_simple_ema
    scheduler_config:
      target: ldm.lr_scheduler.LambdaLinearScheduler
      params: {warm_up_steps: [10000], cycle_lengths: [10000000000000],
               f_start: [1.e-6], f_max: [1.0], f_min: [1.0]}
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {image_size: 64, in_channels: 3, out_channels: 3, model_channels: 192,
               num_res_blocks: 2, attention_resolutions: [1, 2, 4, 8],
               channel_mult: [1, 2, 2, 4, 4], num_heads: 8, use_scale_shift_norm: true,
               resblock_updown: true}
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 3
        monitor: val/rec_loss
        ckpt_path: autoencoder.ckpt
        ddconfig: {double_z: true, z_channels: 3, resolution: 256, in_channels: 3, out_ch: 3,
                   ch: 128, ch_mult: [1, 2, 4], num_res_blocks: 2, attn_resolutions: [],
                   dropout: 0.0}
        lossconfig: {target: torch.nn.Identity}
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 4
    num_workers: 0
    wrap: false
    train: {target: ldm.data.histo.HistoTrain, params: {size: 256}}
lightning:
  callbacks:
    image_logger:
      target: main.ImageLogger
      params: {batch_frequency: 1000, max_images: 8, increase_log_steps: false}
  trainer: {benchmark: true}
"""


MODEL_CHECKPOINT = "pytorch_lightning.callbacks.ModelCheckpoint"


class Inner:
    def __init__(self, width: int, depth: int = 2):
        self.width, self.depth = width, depth


class Ranged:
    def __init__(self, count: Annotated[int, Field(ge=1)] = 1, shares: Sequence[Share] = ()):
        self.count, self.shares = count, shares


class Outer:
    """Every kind of annotation that a YAML value is compared with."""

    def __init__(
        self,
        size: int,
        inner: Mapping[str, Any] | None = None,
        rate: float = 0.5,
        mults: Sequence[int] = (1, 2),
        flag: bool = False,
        name: str | None = None,
        mode: Literal["a", "b"] = "a",
        anything=None,
    ):
        self.size, self.inner, self.rate, self.mults = size, inner, rate, mults


class Open:
    """Stands for a third-party class that takes any name."""

    def __init__(self, size: int = 1, **kwargs):
        self.kwargs = kwargs


INNER, OUTER, OPEN = (f"{cls.__module__}.{cls.__qualname__}" for cls in (Inner, Outer, Open))


def node(target: str = OUTER, **params) -> dict:
    return {"target": target, "params": params}


def whole(model: dict | None = None, **sections) -> dict:
    """A configuration that is valid but for what a test puts into it."""
    model = {"base_learning_rate": 1e-4, **(model or node(size=1))}
    return {"model": model, "data": node(size=2), **sections}


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def message(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- Reading


def test_files_merge_left_to_right_then_overrides(tmp_path):
    a = write(
        tmp_path,
        "model: {target: x, params: {size: 1, mults: [1, 2], rate: 5e-5}}\nvars: {s: 8}",
        "a.yaml",
    )
    b = write(
        tmp_path, "model: {params: {size: 2, mults: [4]}}\ndata: {size: '${vars.s}'}", "b.yaml"
    )
    config = load_configs(
        [a, b], ["model.params.size=3", "model.params.mults.0=7", "vars.s=16", "vars.q=a=b"]
    )
    assert isinstance(config, DictConfig)
    assert resolve(config) == {
        "model": {"target": "x", "params": {"size": 3, "mults": [7], "rate": 5e-5}},
        "vars": {"s": 16, "q": "a=b"},
        "data": {"size": 16},
    }


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("=4", None),
        ("=[0,1]", [0, 1]),
        ("=1e-4", 1e-4),
        ("=null", None),
        ("={a: 1}", {"a": 1}),
        ("=x y", "x y"),
    ],
)
def test_override_values_are_yaml(tmp_path, override, value):
    config = load_configs([write(tmp_path, "vars: {}")], [f"vars.k{override}"])
    assert config.vars.k == (4 if override == "=4" else value)


def test_empty_and_comment_only_files_change_nothing(tmp_path):
    paths = [
        write(tmp_path, t, f"{i}.yaml")
        for i, t in enumerate(["", "# nothing\n", "vars: {a: 1}", "---\n"])
    ]
    assert resolve(load_configs(paths)) == {"vars": {"a": 1}}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model:\n  a: [1\nb: 2\n", ["a.yaml:3:", "not valid YAML"]),
        ("a: 1\nb: 2\na: 3\n", ["a.yaml:3:1", "duplicate key a"]),
        ("a: !!python/object:os.x {}\n", ["a.yaml:1:4", "not valid YAML"]),
        ("a:\n\tb: 1\n", ["a.yaml:2:1", "not valid YAML"]),
        ("- 1\n- 2\n", ["a.yaml", "not a mapping"]),
        ("just words\n", ["a.yaml", "not a mapping"]),
        ("vars: {a: '${b'}\n", ["a.yaml", "vars.a"]),
        ("vars: {a: '${nothing.here}'}\n", ["vars.a", "nothing.here"]),
        ("vars: {a: '${vars.b}', b: '${vars.a}'}\n", ["vars.a", "Recursive"]),
        ("vars:\n  a: ???\n", ["vars.a has no value", "vars.a=VALUE"]),
        (
            "data: {params: {root: '${oc.env:HISTO_NOT_SET}'}}\n",
            [
                "data.params.root: the environment variable HISTO_NOT_SET",
                "give data.params.root=DIR",
            ],
        ),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, monkeypatch, text, parts):
    monkeypatch.delenv("HISTO_NOT_SET", raising=False)
    said = message(load_configs, [write(tmp_path, text)])
    assert all(part in said for part in parts), said


def test_missing_file_folder_binary_and_nothing_at_all(tmp_path):
    assert "no.yaml does not exist" in message(load_configs, [tmp_path / "no.yaml"])
    assert "is a folder" in message(load_configs, [tmp_path])
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert "b.yaml" in message(load_configs, [tmp_path / "b.yaml"])
    assert "`base`" in message(load_configs, [])


def test_files_that_cannot_be_merged(tmp_path):
    a, b = write(tmp_path, "vars: {x: 1}", "a.yaml"), write(tmp_path, "vars: [1]", "b.yaml")
    assert "b.yaml cannot be merged" in message(load_configs, [a, b])


@pytest.mark.parametrize(
    "override",
    [
        "foo",
        "=3",
        "a..b=1",
        "--x=1",
        ".a=1",
        "a.=1",
        "a b=1",
        "vars.l.9=1",
        "vars.l.x=1",
        "vars.k=[1,",
        "vars.k=${b",
    ],
)
def test_malformed_overrides_are_named(tmp_path, override):
    said = message(load_configs, [write(tmp_path, "vars: {l: [1]}")], [override])
    assert repr(override) in said


def test_environment_and_override_of_an_unset_variable(tmp_path, monkeypatch):
    path = write(tmp_path, "vars: {root: '${oc.env:HISTO_SOME}'}")
    monkeypatch.setenv("HISTO_SOME", "/tiles")
    assert load_configs([path]).vars.root == "/tiles"
    monkeypatch.delenv("HISTO_SOME")
    assert load_configs([path], ["vars.root=here"]).vars.root == "here"


# --- Checking


def test_valid_configuration_passes():
    lightning = {
        "trainer": {
            "max_steps": 10,
            "benchmark": True,
            "devices": [0],
            "precision": "bf16-mixed",
            "limit_val_batches": 2,
        },
        "callbacks": {"one": node(OPEN), "off": None},
        "modelcheckpoint": node(MODEL_CHECKPOINT, save_top_k=1),
    }
    model = node(
        size=1, inner=node(INNER, width=2), rate=1, mults=[1], name=None, mode="b", anything=[1]
    )
    validate_config(whole(model, lightning=lightning, vars={"free": {"form": 1}}))
    validate_config(OmegaConf.create(whole(model, lightning=lightning)))
    wrong = whole(model, lightning=lightning, modle={})
    assert "modle: unknown section" in message(validate_config, wrong)


def test_all_problems_are_reported_together_with_the_nearest_name():
    model = node(sise=1, inner=node(INNER, width=2, dept=3), anything=[node(INNER)])
    model["parms"] = {}
    config = whole(
        model, lightning={"trainer": {"max_step": 3, "gpus": 1}, "callback": {}}, modle={}
    )
    config["data"] = node("ldm.data.datamodule.DataModulFromConfig")
    said = message(validate_config, config)
    for part in (
        "10 problems",
        f"model.params.sise: unknown name of {OUTER} (did you mean size?)",
        f"model.params: {OUTER} also needs size |",
        "model.params.inner.params.dept: unknown name",
        "(did you mean depth?)",
        f"model.params.anything[0].params: {INNER} also needs width |",
        "model.parms: unknown name (did you mean params?)",
        "lightning.trainer.max_step: unknown name",
        "lightning.trainer.gpus: not a setting here; give `gpus`",
        "lightning.callback: unknown section (did you mean callbacks?)",
        "modle: unknown section (did you mean model?)",
        "data.target: unknown target ldm.data.datamodule.DataModulFromConfig (did you mean",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("size", "four", "whole number"),
        ("size", 1.5, "whole number"),
        ("size", True, "whole number"),
        ("size", None, "whole number"),
        ("inner", 3, "mapping"),
        ("rate", "fast", "number"),
        ("mults", 4, "list of whole number"),
        ("mults", [1, "x"], "list of whole number"),
        ("flag", 1, "true or false"),
        ("name", 5, "text or null"),
        ("mode", "c", "one of a, b"),
    ],
)
def test_values_of_the_wrong_type_are_reported(name, value, wanted):
    said = message(validate_config, whole(node(**{"size": 1, name: value})))
    assert f"model.params.{name}: {value!r} must be" in said
    assert wanted in said


@pytest.mark.parametrize(
    ("name", "params", "part"),
    [
        ("diffusion.LatentDiffusion", {"parameterization": "x0"}, "one of eps, v, flow"),
        ("diffusion.LatentDiffusion", {"loss_weighting": "snr"}, "one of none, min_snr"),
        ("diffusion.LatentDiffusion", {"loss_type": "l3"}, "one of l1, l2"),
        ("diffusion.LatentDiffusion", {"min_snr_gamma": 0.0}, "must be above 0"),
        ("diffusion.LatentDiffusion", {"timesteps": 10**9}, "must be in [1, 1000000]"),
        ("diffusion.LatentDiffusion", {"time_shift": "big"}, "must be"),
        ("diffusion.LatentDiffusion", {"scale_factor": [1.0, 0.0]}, "must be above 0"),
        ("label_adapter.LabelAdapter", {"label_dropout": -0.1}, "must be in [0, 1)"),
        ("label_adapter.LabelAdapter", {"embedding_rate": 0}, "must be above 0"),
        ("label_adapter.LabelAdapter", {"tune": "head"}, "one of embedding, all"),
        ("patch_pca.PatchPCA", {"exponent": 2.0}, "must be in [0, 1]"),
    ],
)
def test_settings_of_the_models_are_checked_before_they_are_built(name, params, part):
    ((key, value),) = params.items()
    said = message(validate_config, whole(node(f"ldm.models.{name}", **params)))
    assert f"model.params.{key}: " in said and part in said


@pytest.mark.parametrize(
    ("params", "part"),
    [({"disc_loss": "wgan"}, "one of hinge, vanilla"), ({"kl_weight": -1}, "kl_weight: -1")],
)
def test_settings_of_the_loss_are_checked_before_it_is_built(params, part):
    loss = node("ldm.modules.losses.LPIPSWithDiscriminator", disc_start=0, **params)
    model = node("ldm.models.autoencoder.AutoencoderKL", lossconfig=loss)
    assert part in message(validate_config, whole(model))


@pytest.mark.parametrize(
    ("params", "part"),
    [
        ({"count": 0}, "model.params.count: 0 must be at least 1"),
        ({"count": "0"}, "model.params.count: '0' must be of type whole number"),
        ({"shares": [0.5, 2]}, "model.params.shares: 2 must be in [0, 1]"),
        ({"shares": [float("nan")]}, "model.params.shares: nan must be in [0, 1]"),
    ],
)
def test_ranges_in_annotations_are_checked(params, part):
    name = f"{Ranged.__module__}.{Ranged.__qualname__}"
    assert part in message(validate_config, whole(node(name, **params)))
    validate_config(whole(node(name, count=1, shares=[0, 1, 0.5])))


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"data": node(size=1)}, "model: must be a mapping with target"),
        ({"model": whole()["model"]}, "data: must be a mapping with target"),
        (
            whole({**node(size=1), "base_learning_rate": 0}),
            "model.base_learning_rate: 0 must be in (0, 10]",
        ),
        (whole({**node(size=1), "base_learning_rate": "x"}), "model.base_learning_rate: 'x'"),
        (
            whole({**node(size=1), "base_learning_rate": float("nan")}),
            "model.base_learning_rate: nan",
        ),
        (whole({"target": OUTER, "params": [1]}), "model.params: [1] must be a mapping"),
        (whole({"target": None}), "model.target: target None must be a dotted name"),
        (whole(node("ldm.config.SECTIONS")), "model.target: ldm.config.SECTIONS is no class"),
        (whole(node("no_such_package.Thing")), "unknown target no_such_package.Thing"),
        (
            {**whole(), "data": node(size=2, anything=[node("taming.data.CustomTrain")])},
            "; tiles in folders are ldm.data.tiles.TileFolder",
        ),
        (whole(lightning=3), "lightning: must be a mapping"),
        (whole(lightning={"trainer": [1]}), "lightning.trainer: must be"),
        (
            whole(lightning={"trainer": {"max_steps": "many"}}),
            "lightning.trainer.max_steps: 'many' must be of type whole number",
        ),
        (whole(lightning={"callbacks": [1]}), "lightning.callbacks: must be"),
        (
            whole(lightning={"callbacks": {"x": {"params": {}}}}),
            "lightning.callbacks.x: must be null or",
        ),
        (
            whole(lightning={"logger": "csv"}),
            "lightning.logger: 'csv' must be tensorboard or wandb",
        ),
        (whole(lightning={"logger": ["wandb", 1]}), "lightning.logger[1]: 1 must be"),
        (
            whole(lightning={"modelcheckpoint": node(MODEL_CHECKPOINT, keep_last=0)}),
            "params.keep_last: 0 must be at least 1",
        ),
    ],
)
def test_structure_is_checked(config, part):
    assert part in message(validate_config, config)


def test_native_names_are_exact_and_foreign_open_classes_believed(monkeypatch):
    assert instantiate_from_config(node(OPEN, other=3)).kwargs == {"other": 3}
    monkeypatch.setattr(config_module, "_is_own", lambda name: True)
    assert "other: unknown name" in message(validate_config, whole(node(OPEN, other=3)))


def test_ddconfig_is_checked_within():
    ddconfig = {"ch": 8, "ch_mutl": [1, 2], "num_res_blocks": 1, "z_channels": 2, "resolution": 16}
    model = node("ldm.modules.autoencoder.AutoencoderKL", ddconfig=ddconfig, embed_dim=2)
    said = message(validate_config, whole(model))
    assert "model.params.ddconfig.ch_mutl: unknown name of" in said
    assert "model.params.ddconfig: ldm.modules.autoencoder.Architecture also needs ch_mult" in said


# --- Building


def test_instantiate_builds_and_leaves_inner_nodes_plain():
    config = OmegaConf.create(
        {"w": 5, "x": node(size=3, inner=node(INNER, width="${w}"), mults=[1, 2])}
    )
    built = instantiate_from_config(config.x, rate=0.25)
    assert (built.size, built.rate) == (3, 0.25)
    assert built.inner == node(INNER, width=5)
    assert type(built.inner) is dict
    assert type(built.mults) is list


def test_extra_arguments_count_as_given_and_win():
    assert instantiate_from_config({"target": INNER}, width=3).width == 3
    assert instantiate_from_config(node(INNER, width=2), width=3).width == 3
    assert instantiate_from_config({"target": INNER, "params": None}, width=3).depth == 2


def test_instantiate_reports_inner_nodes_too():
    said = message(instantiate_from_config, node(size=1, inner=node(INNER, widht=2), rat=1))
    assert "params.inner.params.widht" in said
    assert "params.rat: unknown name" in said
    said = message(instantiate_from_config, {"params": {}})
    assert "has no target" in said and "ldm.data.tiles.TileFolder" in said
    assert "must be a mapping" in message(instantiate_from_config, None)


def test_a_mistake_inside_the_constructor_is_not_disguised():
    with pytest.raises(ZeroDivisionError):
        instantiate_from_config({"target": f"{__name__}.Broken"})


class Broken:
    def __init__(self):
        self.value = 1 // 0


@pytest.mark.parametrize("name", ["", "torch", ".x", "a..b", "x.", 3, None, "..a.b"])
def test_malformed_targets(name):
    assert "target" in message(get_obj_from_str, name)


def test_targets_that_do_not_exist(tmp_path, monkeypatch):
    assert "did you mean ldm.modules.unet.UNetModel?" in message(
        get_obj_from_str, "ldm.modules.unett.UNetModel"
    )
    assert "did you mean UserError?" in message(get_obj_from_str, "ldm.errors.UserEror")
    # What a native module has imported is not a class of this package.
    assert "unknown target" in message(get_obj_from_str, "ldm.cli.Path")
    assert "unknown target" in message(get_obj_from_str, "ldm.cli.os")
    (tmp_path / "needs_more.py").write_text("import not_a_package_at_all\nclass A: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "needs the package not_a_package_at_all" in message(get_obj_from_str, "needs_more.A")


def test_only_own_targets_may_come_with_weights():
    require_own_targets(
        node("ldm.modules.unet.UNetModel", inner=node("ldm.errors.UserError")), "x.ckpt"
    )
    said = message(
        require_own_targets, node("ldm.errors.UserError", a=[node("subprocess.Popen")]), "x.ckpt"
    )
    assert "x.ckpt: params.a[0].target='subprocess.Popen'" in said
    assert "ldm_other" in message(require_own_targets, node("ldm_other.A"), "x.ckpt")


# --- Published configurations


@pytest.fixture
def tiles(monkeypatch, tmp_path) -> str:
    monkeypatch.setenv("HISTO_DATA", str(tmp_path))
    return str(tmp_path)


def targets_in(value) -> set[str]:
    if isinstance(value, dict):
        found = {value["target"]} if "target" in value else set()
        return found.union(*(targets_in(item) for item in value.values()))
    return set().union(*(targets_in(item) for item in value)) if isinstance(value, list) else set()


def test_published_diffusion_is_read_in_native_names(tmp_path, tiles, caplog):
    with caplog.at_level(logging.INFO, "ldm.legacy"):
        config = resolve(load_configs([write(tmp_path, PUBLISHED_DIFFUSION)]))
    assert len(caplog.records) == 1  # one line for everything
    assert "model.params.log_every_t" in caplog.text
    assert targets_in(config) == {
        "ldm.models.diffusion.LatentDiffusion",
        "ldm.modules.lr_schedule.LambdaLinearScheduler",
        "ldm.modules.unet.UNetModel",
        "ldm.models.autoencoder.AutoencoderKL",
        "ldm.data.datamodule.DataModuleFromConfig",
        "ldm.data.tiles.TileFolder",
        "ldm.models.callbacks.ImageLogger",
    }
    params = config["model"]["params"]
    assert params["beta_schedule"] == "scaled_linear"
    assert params["scale_factor"] is None  # measured
    assert (params["linear_start"], params["linear_end"], params["loss_type"]) == (
        0.0015,
        0.0155,
        "l1",
    )
    assert params["first_stage_config"]["params"]["lossconfig"] is None
    assert params["first_stage_config"]["params"]["ckpt_path"] == "autoencoder.ckpt"
    assert not set(params) & set(UNUSED["ldm.models.diffusion.LatentDiffusion"])
    assert config["data"]["params"]["train"]["params"] == {"size": 256, "root": tiles}
    assert "wrap" not in config["data"]["params"]


@pytest.mark.parametrize("text", [PUBLISHED_AUTOENCODER, PUBLISHED_DIFFUSION])
def test_published_files_are_valid_for_the_real_classes(tmp_path, tiles, text):
    config = load_configs([write(tmp_path, text)])
    validate_config(config)
    assert upgrade_config(config) == config  # nothing is translated twice


def test_published_file_with_mistakes_names_them_all(tmp_path, tiles):
    overrides = [
        "model.params.unet_config.params.use_spatial_transformer=True",
        "model.params.unet_config.params.model_chanels=4",
        "model.params.cond_stage_config={target: ldm.modules.encoders.modules.BERTEmbedder}",
        "model.params.first_stage_config.target=ldm.models.autoencoder.VQModelInterface",
        "model.params.scale_factor=0.2",
        "lightning.find_unused_parameters=True",
    ]
    said = message(load_configs, [write(tmp_path, PUBLISHED_DIFFUSION)], overrides)
    for part in (
        "unet_config.params.use_spatial_transformer: True is not supported; there is no text",
        "model_chanels: unknown name of ldm.modules.unet.UNetModel (did you mean model_channels?)",
        "model.params.cond_stage_config: {'target'",
        "set it to __is_unconditional__",
        "VQModelInterface: vector-quantised first stages are not supported",
        "model.params.scale_factor: 0.2 contradicts scale_by_std",
        "lightning.find_unused_parameters: True is not supported",
    ):
        assert part in said, part


@pytest.mark.parametrize("value", [None, ""])
def test_histo_train_says_where_the_data_root_comes_from(tmp_path, monkeypatch, value):
    monkeypatch.delenv("HISTO_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("HISTO_DATA", value)
    path = write(tmp_path, PUBLISHED_AUTOENCODER)
    said = message(load_configs, [path])
    assert "HISTO_DATA" in said
    assert "data.params.train.params.root=DIR" in said
    config = load_configs([path], ["data.params.train.params.root=/tiles"])
    assert config.data.params.train.params.root == "/tiles"


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (
            {},
            {
                "beta_schedule": "scaled_linear",
                "scale_factor": 1.0,
                "linear_start": 1e-4,
                "loss_type": "l2",
            },
        ),
        (
            {"beta_schedule": "linear", "scale_by_std": True},
            {"beta_schedule": "scaled_linear", "scale_factor": None},
        ),
        ({"beta_schedule": "sqrt_linear"}, {"beta_schedule": "linear"}),
        (
            {"beta_schedule": "cosine", "scale_factor": 0.2},
            {"beta_schedule": "cosine", "scale_factor": 0.2},
        ),
        ({"scale_by_std": True, "scale_factor": 1.0}, {"scale_factor": None}),
        ({"scale_by_std": False, "scale_factor": 0.18215}, {"scale_factor": 0.18215}),
    ],
)
def test_published_diffusion_defaults_and_schedules(params, expected):
    upgraded = upgrade_config(node("ldm.models.diffusion.ddpm.LatentDiffusion", **params))
    assert upgraded["target"] == "ldm.models.diffusion.LatentDiffusion"
    assert {name: upgraded["params"][name] for name in expected} == expected


NATIVE_DIFFUSION = "ldm.models.diffusion.LatentDiffusion"
PUBLISHED = "ldm.models.diffusion.ddpm.LatentDiffusion"
OVERLAY = f"model: {{target: {NATIVE_DIFFUSION}, params: {{monitor: null}}}}"


def schedule_of(paths: list, overrides: Sequence[str] = ()) -> dict:
    params = resolve(load_configs(paths, overrides))["model"]["params"]
    names = ("beta_schedule", "linear_start", "linear_end", "loss_type", "scale_factor")
    return {name: params[name] for name in names if name in params}


def test_a_native_overlay_keeps_the_schedule_of_a_published_file(tmp_path):
    """Merged before it was translated, the published file lost its defaults and its names."""
    published = write(
        tmp_path, f"model: {{target: {PUBLISHED}, params: {{scale_factor: 0.2}}}}", "p.yaml"
    )
    alone = schedule_of([published])
    assert alone == {
        "beta_schedule": "scaled_linear",
        "linear_start": 1e-4,
        "linear_end": 2e-2,
        "loss_type": "l2",
        "scale_factor": 0.2,
    }
    overlay = write(tmp_path, OVERLAY, "o.yaml")
    assert schedule_of([published, overlay]) == alone
    assert schedule_of([published], [f"model.target={NATIVE_DIFFUSION}"]) == alone
    # What a file without a target says is in the names of the file that it changes.
    words = "model: {params: {beta_schedule: linear, scale_factor: null, scale_by_std: true}}"
    more = write(tmp_path, words, "m.yaml")
    assert schedule_of([published, more]) == {**alone, "scale_factor": None}
    assert schedule_of([published, more, overlay]) == {**alone, "scale_factor": None}
    # And in native names, after an overlay that has them.
    native = schedule_of([published, overlay], ["model.params.beta_schedule=linear"])
    assert native == {**alone, "beta_schedule": "linear"}


def test_a_published_overlay_changes_only_what_it_says(tmp_path):
    """It used to set the published defaults too, and a measured scale factor to 1."""
    params = "{scale_factor: null, beta_schedule: cosine, loss_type: huber}"
    native = write(tmp_path, f"model: {{target: {NATIVE_DIFFUSION}, params: {params}}}", "n.yaml")
    alone = {"scale_factor": None, "beta_schedule": "cosine", "loss_type": "huber"}
    for said, changed in (
        ("{log_every_t: 1}", {}),
        ("{scale_by_std: false}", {}),
        ("{scale_factor: 0.3}", {"scale_factor": 0.3}),
        ("{beta_schedule: linear}", {"beta_schedule": "scaled_linear"}),
    ):
        overlay = write(tmp_path, f"model: {{target: {PUBLISHED}, params: {said}}}", "o.yaml")
        assert schedule_of([native, overlay]) == {**alone, **changed}


def test_a_published_data_section_takes_a_native_overlay(tmp_path, tiles):
    overlay = write(
        tmp_path,
        "data: {target: ldm.data.datamodule.DataModuleFromConfig, params: {batch_size: 2}}",
        "o.yaml",
    )
    config = load_configs([write(tmp_path, PUBLISHED_AUTOENCODER), overlay])
    validate_config(config)
    assert config.data.params.batch_size == 2 and "wrap" not in config.data.params


def test_native_names_are_left_alone(caplog):
    native = node("ldm.models.diffusion.LatentDiffusion", beta_schedule="linear", log_every_t=1)
    with caplog.at_level(logging.INFO, "ldm.legacy"):
        assert upgrade_config(native) == native
        assert upgrade_config(OmegaConf.create(native)) == native
    assert not caplog.records


def test_upgrade_leaves_its_argument_as_it_was():
    config = node(
        "main.DataModuleFromConfig", wrap=True, num_workers=None, batch_size=1, train=None
    )
    copy = {**config, "params": dict(config["params"])}
    assert upgrade_config(config)["params"] == {"batch_size": 1, "train": None}
    assert config == copy


@pytest.mark.parametrize("target", UNSUPPORTED_TARGETS)
def test_unsupported_targets_say_what_to_do(target):
    assert UNSUPPORTED_TARGETS[target] in message(upgrade_config, {"model": node(target)})


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        ("main.DataModuleFromConfig", "test", {"target": "x.y"}),
        ("main.ImageLogger", "disabled", True),
        ("ldm.models.autoencoder.AutoencoderKL", "colorize_nlabels", 3),
        ("ldm.modules.losses.contperceptual.LPIPSWithDiscriminator", "use_actnorm", True),
        ("ldm.modules.diffusionmodules.openaimodel.EncoderUNetModel", "dims", 3),
        ("ldm.models.diffusion.ddpm.LatentDiffusion", "num_timesteps_cond", True),
        ("ldm.models.diffusion.ddpm.LatentDiffusion", "learn_logvar", True),
    ],
)
def test_published_values_that_would_mean_something_are_refused(target, name, value):
    said = message(upgrade_config, node(target, **{name: value}))
    assert f"params.{name}: {value!r} is not supported; " in said


def test_published_ddconfig_names():
    inert = {"attn_type": "vanilla", "tanh_out": False}
    target = "ldm.models.autoencoder.AutoencoderKL"
    assert upgrade_config(node(target, ddconfig={"ch": 8, **inert}))["params"] == {
        "ddconfig": {"ch": 8}
    }
    said = message(upgrade_config, node(target, ddconfig={"attn_type": "linear"}))
    assert "params.ddconfig.attn_type: 'linear' is not supported; set it to vanilla" in said


def test_sections_may_leave_out_the_target_that_is_understood():
    lightning = {
        "callbacks": {"image_logger": {"params": {"max_images": 4}}},
        "modelcheckpoint": {"params": {}},
    }
    upgraded = upgrade_config({"lightning": {**lightning, "find_unused_parameters": False}})[
        "lightning"
    ]
    assert upgraded["callbacks"]["image_logger"]["target"] == "ldm.models.callbacks.ImageLogger"
    assert upgraded["modelcheckpoint"]["target"] == "pytorch_lightning.callbacks.ModelCheckpoint"
    assert "find_unused_parameters" not in upgraded


def test_null_sections_and_callbacks_are_absent(tmp_path, tiles):
    overrides = ["lightning.callbacks.image_logger=null", "lightning.trainer=null", "vars=null"]
    config = load_configs([write(tmp_path, PUBLISHED_AUTOENCODER)], overrides)
    validate_config(config)
    assert config.lightning == {"callbacks": {}}
    assert "vars" not in config


@pytest.mark.parametrize("native", sorted(set(LEGACY_TARGETS.values())))
def test_tables_agree_with_the_native_classes(native):
    """Every native target exists, and no parameter that it takes is dropped as meaningless."""
    names = set(inspect.signature(get_obj_from_str(native)).parameters)
    assert not names & set(UNUSED.get(native, {}))


def test_tables_of_names_without_effect_name_native_targets():
    assert set(UNUSED) <= set(LEGACY_TARGETS.values())


def test_import_is_light():
    code = "import sys, ldm.config; print({'torch', 'pytorch_lightning'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
